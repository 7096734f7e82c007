"""Internal influence: the gradient of a layer, while the input comes from its baseline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook.attribution.means import Means
from tdhook.attribution.paths import inputs, ways, weighed
from tdhook.contexts.attribution import Shared
from tdhook.contexts.compared import SPREAD, Compared, compared_with, write_under
from tdhook.passes.runner import Runner
from tdhook.passes.variants import Variants
from tdhook.perturbing.quadrature import quadrature
from tdhook.perturbing.references import Baseline, References
from tdhook.targets import TargetLike

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["InternalInfluence"]


class InternalInfluence(Compared):
    """The mean gradient of a layer on the way of the input from its baseline (Leino et al. 2018, Definition 1).

    Args:
        target: what is explained (:mod:`tdhook.targets`); by default the only output there is.
        baseline: where the way of the inputs begins (:data:`~tdhook.perturbing.references.Baseline`).
        samples: how many references are drawn where the baseline is drawn.
        steps: how many gradients are averaged.
        rule: of the quadrature, as :class:`~tdhook.attribution.IntegratedGradients` takes it.
        **options: those of :class:`~tdhook.contexts.attribution.Attribution`: ``input_modules`` names the layers.
    """

    def __init__(
        self,
        target: TargetLike = None,
        *,
        baseline: Baseline | References = 0.0,
        samples: int = 1,
        steps: int = 32,
        rule: str = "gauss_legendre",
        **options: Unpack[Shared],
    ) -> None:
        super().__init__(target, **options)
        self.references, self.places = compared_with(baseline, samples), quadrature(rule, steps)

    @property
    def changes_inputs(self) -> bool:
        """All inputs are."""
        return True

    def explain(self, runner: Runner, td: TensorDictBase) -> Mapping[NestedKey, Tensor]:
        """One forward pass to choose, then a forward and a backward pass for each step, as many at once as fit."""
        means = Means(self.spreads)
        with runner.forward(td) as run:
            variants, sources = Variants(runner, run), list(run.sources())
            ends = inputs(run)
            self.require_finite_starts(runner, variants, run, [ends])
            for way in ways(self, run, ends):
                means.add(weighed(variants, way, self.places, sources))
            write_under(SPREAD, runner, run, means.deviations())
        return means.mean
