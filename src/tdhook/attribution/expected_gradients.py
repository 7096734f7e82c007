"""Expected gradients: integrated gradients from references drawn from data, one gradient for each."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import TYPE_CHECKING

from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook.attribution.means import Means
from tdhook.attribution.paths import Way
from tdhook.contexts.attribution import Shared
from tdhook.contexts.compared import Complete
from tdhook.passes.runner import Runner
from tdhook.passes.variants import Variants
from tdhook.perturbing.references import Baseline, References
from tdhook.targets import TargetLike

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["ExpectedGradients"]


class ExpectedGradients(Complete):
    """``E[(x - b) df/dx(b + t (x - b))]`` over data ``b`` and ``t`` in ``[0, 1]`` (Erion et al. 2021, eq. 3).

    Known as GradientSHAP, too. On average over the draws, relevance adds up to ``f(x) - E[f(b)]``; the places ``t`` are
    spread evenly, one in each of as many stretches as there are samples.

    Args:
        target: what is explained (:mod:`tdhook.targets`); by default the only output there is.
        baseline: data to draw from, a TensorDict, or :class:`~tdhook.perturbing.references.References`; by default the
            batch.
        samples: how many are drawn.
        seed: of the places.
        ledger: whether to account for it (:class:`~tdhook.contexts.compared.Complete`), at a forward pass for each
            sample.
        **options: those of :class:`~tdhook.contexts.attribution.Attribution`: ``attribute``, ``input_modules``, ...
    """

    def __init__(
        self,
        target: TargetLike = None,
        *,
        baseline: Baseline | References = "sample",
        samples: int = 32,
        seed: int = 0,
        ledger: bool = False,
        **options: Unpack[Shared],
    ) -> None:
        samples = 1 if isinstance(baseline, References) else samples
        super().__init__(target, baseline=baseline, samples=samples, ledger=ledger, **options)
        self.seed = seed

    @property
    def places(self) -> list[float]:
        """How far along the way from each of the references the gradient is taken."""
        assert self.references is not None
        chance, count = random.Random(f"{self.seed} {self.references.first}"), self.samples
        return [(i + chance.random()) / count for i in chance.sample(range(count), count)]

    def explain(self, runner: Runner, td: TensorDictBase) -> Mapping[NestedKey, Tensor]:
        """One forward pass to choose, then a forward and a backward pass for each sample, as many at once as fit."""
        found: dict[NestedKey, Tensor] = {}
        places = self.places
        with runner.forward(td) as run:
            meeting, variants = self.meeting(runner, run), Variants(runner, run)
            groups = run.independent_sources()
            if not self.ledger:
                self.require_finite_starts(runner, variants, run, groups)
            for ends in groups:
                means = Means(self.spreads)

                def points(
                    numbers: range, ends: Mapping[NestedKey, Tensor] = ends
                ) -> dict[NestedKey, Tensor]:
                    way = Way(self.starts(run, ends, numbers), ends)
                    return way.points(places[numbers.start : numbers.stop])

                for answer in variants.gradients(self.samples, points):
                    way = Way(self.starts(run, ends, answer.numbers), ends)
                    means.add_all(way.shares(answer.found), len(answer.numbers))
                found.update(means.mean)
                rises = self.rises(variants, run, ends) if self.ledger else None
                self.told(runner, run, means.mean, rises, means.deviations(), meeting)
        return found
