"""Guided backpropagation and the deconvolutional network, as methods of their own names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tdhook.attribution.lrp import LRP, Options
from tdhook.targets import TargetLike

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Deconvnet", "GuidedBackprop"]


class GuidedBackprop(LRP):
    """The gradient, of which each ReLU lets pass what is positive and where its input was (Springenberg et al. 2015).

    It sums to nothing, and hardly depends on what is explained (Adebayo et al. 2018): it shows edges. ReLUs are
    ``nn.ReLU`` and torch's ``relu``; what is one by other words, ``clamp(min=0)`` say, lets its gradient through.

    Args:
        target: what is explained (:mod:`tdhook.targets`); by default the only output there is.
        **options: those of :class:`~tdhook.attribution.lrp.LRP`, whose preset ``"guided_backprop"`` it is.
    """

    def __init__(self, target: TargetLike = None, **options: Unpack[Options]) -> None:
        super().__init__("guided_backprop", target=target, **options)


class Deconvnet(LRP):
    """The gradient, of which each ReLU lets pass what is positive (Zeiler and Fergus 2014, section 2.1).

    ReLUs are those of :class:`GuidedBackprop`.

    Args:
        target: what is explained (:mod:`tdhook.targets`); by default the only output there is.
        **options: those of :class:`~tdhook.attribution.lrp.LRP`, whose preset ``"deconvnet"`` it is.
    """

    def __init__(self, target: TargetLike = None, **options: Unpack[Options]) -> None:
        super().__init__("deconvnet", target=target, **options)
