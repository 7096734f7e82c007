"""Conductance: what a layer passes on, while the input comes from its baseline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook.attribution.internal_influence import InternalInfluence
from tdhook.attribution.means import Means
from tdhook.attribution.paths import carried, inputs, ways
from tdhook.contexts.attribution import Shared
from tdhook.contexts.compared import Complete
from tdhook.passes.runner import Runner
from tdhook.passes.variants import Variants
from tdhook.perturbing.references import Baseline, References
from tdhook.targets import TargetLike

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Conductance", "InternalInfluence"]


class Conductance(Complete):
    """The integral of ``df/dh dh/dt`` over the way of the input from its baseline (Dhamdhere et al. 2019, eq. 2).

    ``h`` are the layers that ``input_modules`` names, and the inputs, whose conductance is their integrated gradient.
    The sum over all units that the way goes through is ``f(x) - f(b)``, up to the trapezoid rule.

    Args:
        target: what is explained (:mod:`tdhook.targets`); by default the only output there is.
        baseline: where the way of the inputs begins (:data:`~tdhook.perturbing.references.Baseline`).
        steps: of the way.
        **options: those of :class:`~tdhook.contexts.compared.Complete`: ``samples``, ``ledger``, ``input_modules``, ...

    Raises:
        ValueError: there is no step.
    """

    def __init__(
        self,
        target: TargetLike = None,
        *,
        baseline: Baseline | References = 0.0,
        samples: int = 1,
        steps: int = 64,
        ledger: bool = False,
        **options: Unpack[Shared],
    ) -> None:
        if steps < 1:
            raise ValueError(f"a way has at least one step, got steps={steps}")
        super().__init__(target, baseline=baseline, samples=samples, ledger=ledger, **options)
        self.places = [i / steps for i in range(steps + 1)]

    @property
    def changes_inputs(self) -> bool:
        """All inputs are."""
        return True

    def explain(self, runner: Runner, td: TensorDictBase) -> Mapping[NestedKey, Tensor]:
        """One forward pass to choose, then a forward and a backward pass for each step, as many at once as fit."""
        means = Means(self.spreads)
        with runner.forward(td) as run:
            ends, sources, meeting = inputs(run), list(run.sources()), self.meeting(runner, run)
            variants = Variants(runner, run)
            others = [key for key in ends if self.ledger and key not in sources]
            for way in ways(self, run, ends):
                on_it = way.at(self.places)
                means.add(carried(variants, len(self.places), on_it, [*sources, *others]))
            apart = {key: means.mean.pop(key) for key in others}
            first = {key: means.mean[key] for key in run.independent_sources()[0]}
            rises = self.rises(variants, run, ends) if self.ledger else None
            spread = {key: x for key, x in means.deviations().items() if key in sources}
            self.told(runner, run, first, rises, spread, meeting, apart)
        return means.mean
