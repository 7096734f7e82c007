"""Integrated gradients on the way from a blurred picture to a sharp one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook.attribution.paths import carried, pictures
from tdhook.contexts.attribution import Shared
from tdhook.contexts.compared import Complete
from tdhook.passes.runner import Runner
from tdhook.passes.variants import Variants
from tdhook.perturbing.baselines import blurred
from tdhook.perturbing.references import References
from tdhook.targets import TargetLike

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["BlurIntegratedGradients"]


class BlurIntegratedGradients(Complete):
    """The gradient, integrated while a picture gets sharp (Xu, Venugopalan and Sundararajan 2020, eq. 4).

    No pixel values are made up that the picture does not have. Pictures are inputs with at least two axes of features,
    the last two; other inputs stay as they are and get none. The sum is ``f(x) - f(blurred x)``, up to the trapezoid
    rule.

    Args:
        target: what is explained (:mod:`tdhook.targets`); by default the only output there is.
        width: where the way begins: the standard deviation of the blur, in pixels.
        steps: of the way, on which the width goes down evenly.
        ledger: whether to account for it (:class:`~tdhook.contexts.compared.Complete`).
        **options: those of :class:`~tdhook.contexts.attribution.Attribution`: ``attribute``, ...

    Raises:
        ValueError: the width or the number of steps is not positive; or, when it is called, no input is a picture.
    """

    def __init__(
        self,
        target: TargetLike = None,
        *,
        width: float = 10.0,
        steps: int = 32,
        ledger: bool = False,
        **options: Unpack[Shared],
    ) -> None:
        if steps < 1:
            raise ValueError(f"a way has at least one step, got steps={steps}")
        super().__init__(target, baseline=References(blurred(width)), ledger=ledger, **options)
        self.widths = [width * (1 - i / steps) for i in range(steps + 1)]

    def explain(self, runner: Runner, td: TensorDictBase) -> Mapping[NestedKey, Tensor]:
        """One forward pass to choose, then a forward and a backward pass for each step, as many at once as fit."""
        with runner.forward(td) as run:
            ends, meeting = pictures(run), self.meeting(runner, run)
            variants = Variants(runner, run)

            def points(numbers: range) -> dict[NestedKey, Tensor]:
                widths = self.widths[numbers.start : numbers.stop]
                return {
                    key: torch.stack([blurred(width)(x) if width else x for width in widths])
                    for key, x in ends.items()
                }

            found = carried(variants, len(self.widths), points, ends)
            rest = run.sources().keys() - found.keys()
            lead = (len(variants.values),) if variants.several else ()
            found.update({key: x.new_zeros(*lead, *x.shape) for key, x in run.sources(rest).items()})
            rises = self.rises(variants, run, ends) if self.ledger else None
            inputs = {key: found[key] for key in run.independent_sources()[0]}
            self.told(runner, run, inputs, rises, {}, meeting)
        return found
