"""Integrated gradients: the gradient, averaged on the way from a baseline to the input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook.contexts.attribution import Attribution, Shared
from tdhook.passes.runner import Runner
from tdhook.perturbing.baselines import Baseline, references
from tdhook.targets import TargetLike

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["IntegratedGradients"]


class IntegratedGradients(Attribution):
    """``(x - b) * integral of df/dx(b + t (x - b)) over t in [0, 1]`` (Sundararajan et al. 2017, eq. 1).

    The sum over the inputs is ``f(x) - f(b)``, up to the quadrature: Gauss-Legendre, which is exact for a gradient that
    is a polynomial of degree below ``2 steps`` along the way. The target chooses once, at the input.

    Args:
        target: what is explained (:mod:`tdhook.targets`); by default the only output there is.
        baseline: where the way begins: a number, a tensor of the shape of one input, ``"mean"`` or ``"sample"`` over
            the batch, a function of the inputs, or these by key (:data:`~tdhook.perturbing.baselines.Baseline`).
        steps: how many gradients are averaged.
        **options: those of :class:`~tdhook.contexts.attribution.Attribution`: ``attribute``, ``input_modules``, ...
    """

    def __init__(
        self,
        target: TargetLike = None,
        *,
        baseline: Baseline = 0.0,
        steps: int = 32,
        **options: Unpack[Shared],
    ) -> None:
        super().__init__(target, **options)
        if steps < 1:
            raise ValueError(f"at least one gradient is averaged, got steps={steps}")
        self.baseline, self.steps = baseline, steps

    def explain(self, runner: Runner, td: TensorDictBase) -> Mapping[NestedKey, Tensor]:
        """One forward pass to choose, then a forward and a backward pass for each step."""
        with runner.forward(td) as run:
            target, asked = runner.pinned(run)
            ends = {key: x.detach() for key, x in run.sources().items()}
        starts = references(self.baseline, ends)
        total = {key: torch.zeros_like(x) for key, x in ends.items()}
        for place, weight in gauss_legendre(self.steps):
            point = {key: torch.lerp(starts[key], x, place) for key, x in ends.items()}
            with runner.forward(asked, target=target, replaced=point) as run:
                pulled = run.pull(run.seeds(target), run.sources())
            total = {key: total[key] + weight * pulled[key] for key in ends}
        return {key: (x - starts[key]) * total[key] for key, x in ends.items()}


def gauss_legendre(count: int) -> list[tuple[float, float]]:
    """Places in ``[0, 1]`` and their weights, which sum to one (Golub and Welsch 1969)."""
    k = torch.arange(1, count, dtype=torch.float64)
    beside = torch.diag(k / torch.sqrt(4 * k.square() - 1), 1)
    places, vectors = torch.linalg.eigh(beside + beside.T)
    return list(zip(((places + 1) / 2).tolist(), vectors[0].square().tolist(), strict=True))
