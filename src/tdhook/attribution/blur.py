"""Integrated gradients on the way from a blurred picture to a sharp one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook.contexts.attribution import Shared
from tdhook.contexts.compared import Complete
from tdhook.passes.forward import Run
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
        found: dict[NestedKey, Tensor] = {}
        with runner.forward(td) as run:
            ends, meeting = _pictures(run), self.meeting(runner, run)
            variants = Variants(runner, run)

            def points(numbers: range) -> dict[NestedKey, Tensor]:
                return {key: torch.stack([self._at(i, x) for i in numbers]) for key, x in ends.items()}

            for answer in variants.gradients(len(self.widths), points):
                around = points(range(answer.numbers.start - 1, answer.numbers.stop + 1))
                for key, grads in answer.found.items():
                    # By the trapezoid rule, a gradient counts for half of each step beside it.
                    for before, after, grad in zip(around[key][:-2], around[key][2:], grads, strict=True):
                        step = (after - before) / 2
                        found[key] = found[key] + step * grad if key in found else step * grad
            rest = run.sources().keys() - found.keys()
            lead = (len(variants.values),) if variants.several else ()
            found.update({key: x.new_zeros(*lead, *x.shape) for key, x in run.sources(rest).items()})
            rises = self.rises(variants, run, ends) if self.ledger else None
            inputs = {key: found[key] for key in run.independent_sources()[0]}
            self.told(runner, run, inputs, rises, {}, meeting)
        return found

    def _at(self, number: int, pictures: Tensor) -> Tensor:
        """Pictures after so many steps."""
        width = self.widths[max(0, min(number, len(self.widths) - 1))]
        return blurred(width)(pictures) if width else pictures


def _pictures(run: Run) -> dict[NestedKey, Tensor]:
    """The sources that are pictures, detached."""
    sources = run.independent_sources()[0]
    dims = run.batch_dims(sources)
    found = {key: x for key, x in sources.items() if x.dim() >= dims[key] + 2}
    if not found:
        shapes = ", ".join(f"{key!r} {list(x.shape[dims[key] :])}" for key, x in sources.items())
        raise ValueError(
            f"no input is a picture, with at least two axes of features, that could be blurred: {shapes}"
        )
    return found
