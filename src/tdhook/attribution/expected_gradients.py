"""Expected gradients: integrated gradients from references drawn from data, one gradient for each."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import TYPE_CHECKING

from tensordict.utils import NestedKey
from torch import Tensor

from tdhook.attribution.integrated import Integrated, Together
from tdhook.attribution.means import Means
from tdhook.attribution.paths import Way
from tdhook.contexts.attribution import Shared
from tdhook.passes.forward import Run
from tdhook.passes.variants import Variants
from tdhook.perturbing.references import Baseline, References
from tdhook.targets import TargetLike

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["ExpectedGradients"]


class ExpectedGradients(Integrated):
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

    def integrated(self, run: Run, variants: Variants, values: Together) -> Means:
        """The way from each reference times the gradient at one place on it."""
        means, places = Means(self.spreads), self.places

        def way(numbers: range) -> Way:
            return Way(self.starts(run, values.ends, numbers), values.ends)

        def points(numbers: range) -> Mapping[NestedKey, Tensor]:
            return way(numbers).points(places[numbers.start : numbers.stop])

        for answer in variants.gradients(self.samples, points):
            means.add_all(way(answer.numbers).shares(answer.found), len(answer.numbers))
        return means
