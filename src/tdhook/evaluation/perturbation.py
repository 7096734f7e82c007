"""Perturbation curves: what becomes of the target while features are replaced, in order of their relevance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor, nn

from tdhook.evaluation.curves import Curve, InsertionDeletion, PerturbationCurves
from tdhook.evaluation.explaining import GroupsOf, explaining
from tdhook.evaluation.measures import Measure, Measured
from tdhook.evaluation.runs import Method
from tdhook.passes.questions import Asked
from tdhook.perturbing.baselines import Baseline, Replacements
from tdhook.perturbing.features import Features, Groups
from tdhook.targets import TargetLike

__all__ = ["Plan", "insertion_deletion", "perturbation_curve", "ranked"]


Order: TypeAlias = Callable[[Tensor, Tensor, int], Tensor]
"""``(rank [rows, features], number of features in question, how many there are) -> which are replaced``."""

Change: TypeAlias = Callable[[TensorDictBase, Tensor], TensorDictBase]
"""``(copies of some rows [copies * rows, *rest], chosen [copies * rows, features]) -> these, changed``."""

Replacing: TypeAlias = Callable[[Features, TensorDictBase, int], Callable[[TensorDictBase], Change]]
"""``(features, rows of the data, seed) -> rows -> how copies of these are changed``."""


def most_first(rank: Tensor, k: Tensor, count: int) -> Tensor:
    return rank < k


def least_first(rank: Tensor, k: Tensor, count: int) -> Tensor:
    return rank >= count - k


def _all_but_most(rank: Tensor, k: Tensor, count: int) -> Tensor:
    return rank >= k


def replaced(baseline: Baseline) -> Replacing:
    """Features are replaced by those of a baseline."""

    def prepare(features: Features, source: TensorDictBase, seed: int) -> Callable[[TensorDictBase], Change]:
        replacements = Replacements(baseline, features, source, torch.Generator().manual_seed(seed))

        def of(rows: TensorDictBase) -> Change:
            values = replacements(rows)

            def change(inputs: TensorDictBase, chosen: Tensor) -> TensorDictBase:
                copies = len(inputs) // len(rows)
                expanded = {key: x.expand(copies, *x.shape).flatten(0, 1) for key, x in values.items()}
                return features.replaced(inputs, expanded, chosen)

            return change

        return of

    return prepare


def perturbation_curve(
    module: nn.Module,
    td: TensorDictBase,
    method: Method | None = None,
    *,
    target: TargetLike = None,
    keys: Sequence[NestedKey] | None = None,
    groups: Groups = None,
    baseline: Baseline = 0.0,
    measure: Measure = "target",
    steps: int | None = None,
    absolute: bool = False,
    data: TensorDictBase | None = None,
    attribution_key: NestedKey = "attr",
    batch_dims: int | None = None,
    chunk_size: int = 1024,
    seed: int = 0,
) -> PerturbationCurves:
    """Replace features in order of relevance, and measure the model after each step (Samek et al. 2017, section III).

    Features may be of different sizes. A curve counts their entries, and the order goes by relevance per entry, so that
    a random map, which knows nothing, gains nothing from what is large.

    What is explained is chosen once, on the inputs as they are: the action that the policy takes there is asked about
    all along. Among features of the same relevance, chance decides the order.

    Args:
        module: the model, not explained; a TensorDictModule, or a plain module that reads ``"input"`` and writes
            ``"output"``.
        td: inputs, with any batch shape; and their relevance, if there is no ``method``.
        method: what explains them.
        target: what is explained; by default what ``method`` explains, or the only output there is.
        keys: inputs whose features are replaced; by default all that have relevance.
        groups: entries that are one feature and are replaced together (:func:`patches`, :func:`along`); what counts is
            the mean of their relevance.
        baseline: what a feature is replaced by (:data:`Baseline`).
        measure: what is measured: ``"target"``, the value that is explained; ``"probability"``, that of the chosen
            output in a softmax over its last axis; ``"agreement"``, whether the action is still the same (1 or 0); or
            a function ``outputs -> [rows]``.
        steps: how many; by default one for each feature, 50 at most.
        absolute: whether features are ordered by the size of their relevance, whatever its sign.
        data: what baselines ``"mean"`` and ``"sample"`` are taken of, with any batch shape (but for the axes that
            belong to the features); by default ``td``.
        attribution_key: where relevance is.
        batch_dims: how many batch axes tell apart what is explained; the others (time, for a recurrent policy) belong
            to its features, and what is measured is summed over them (the mean, but for the target). By default all.
        chunk_size: how many inputs the model sees at once.
        seed: of all random numbers; global ones are left as they are.

    Returns:
        The two curves, with values ``[*batch, points]`` in double precision.

    Raises:
        KeyError: a key or its relevance is missing.
        TypeError: an input is not floating-point.
        ValueError: the batch is empty, shapes do not fit, or the target explains several outputs.
    """
    plan = Plan(
        module,
        td,
        method,
        target,
        keys,
        groups,
        measure,
        steps,
        absolute,
        attribution_key,
        batch_dims,
        chunk_size,
    )
    # The same draws for each curve, so that these differ in the order alone.
    most, least = plan.curves(
        [(most_first, replaced(baseline)), (least_first, replaced(baseline))], data, seed
    )
    return PerturbationCurves(most, least)


def insertion_deletion(
    module: nn.Module,
    td: TensorDictBase,
    method: Method | None = None,
    *,
    target: TargetLike = None,
    keys: Sequence[NestedKey] | None = None,
    groups: Groups = None,
    insertion_baseline: Baseline = 0.0,
    deletion_baseline: Baseline = 0.0,
    measure: Measure = "probability",
    steps: int | None = None,
    absolute: bool = False,
    data: TensorDictBase | None = None,
    attribution_key: NestedKey = "attr",
    batch_dims: int | None = None,
    chunk_size: int = 1024,
    seed: int = 0,
) -> InsertionDeletion:
    """Put the most relevant features in first, and take them out first (Petsiuk, Das and Saenko 2018, section 3.3).

    There, what is measured is the probability of the class, features are put into a :func:`blurred` picture, and taken
    out by setting them to a constant. With the same baseline for both, ``insertion`` is the curve ``least`` of
    :func:`perturbation_curve` read from its end, and ``deletion`` is ``most``.

    Args:
        module: the model, not explained.
        td: inputs, with any batch shape; and their relevance, if there is no ``method``.
        method: what explains them.
        target: what is explained; by default what ``method`` explains, or the only output there is.
        keys: inputs whose features are replaced; by default all that have relevance.
        groups: features that are replaced together.
        insertion_baseline: where features are put in.
        deletion_baseline: what they are replaced by.
        measure: what is measured, as in :func:`perturbation_curve`.
        steps: how many; by default one for each feature, 50 at most.
        absolute: whether features are ordered by the size of their relevance.
        data: what baselines ``"mean"`` and ``"sample"`` are taken of; by default ``td``.
        attribution_key: where relevance is.
        batch_dims: how many batch axes tell apart what is explained, as in :func:`perturbation_curve`.
        chunk_size: how many inputs the model sees at once.
        seed: of all random numbers.

    Raises:
        KeyError: a key or its relevance is missing.
        TypeError: an input is not floating-point.
        ValueError: the batch is empty, shapes do not fit, or the target has no probability.
    """
    plan = Plan(
        module,
        td,
        method,
        target,
        keys,
        groups,
        measure,
        steps,
        absolute,
        attribution_key,
        batch_dims,
        chunk_size,
    )
    wanted = [(_all_but_most, replaced(insertion_baseline)), (most_first, replaced(deletion_baseline))]
    return InsertionDeletion(*plan.curves(wanted, data, seed))


@dataclass(frozen=True)
class Plan:
    """What curves are measured of."""

    module: nn.Module
    td: TensorDictBase
    method: Method | None
    target: TargetLike
    keys: Sequence[NestedKey] | None
    groups: Groups | GroupsOf
    measure: Measure
    steps: int | None
    absolute: bool
    attribution_key: NestedKey
    batch_dims: int | None
    chunk_size: int

    def curves(
        self, wanted: Sequence[tuple[Order, Replacing]], data: TensorDictBase | None, seed: int
    ) -> list[Curve]:
        """One curve for each order and what features are replaced by."""
        chance = torch.Generator().manual_seed(seed)
        features, points = None, torch.empty(0)
        prepared: list[Callable[[TensorDictBase], Change]] = []
        found: list[list[Tensor]] = [[] for _ in wanted]
        with explaining(
            self.module,
            self.td,
            self.method,
            target=self.target,
            keys=self.keys,
            groups=self.groups,
            attribution_key=self.attribution_key,
            batch_dims=self.batch_dims,
            chunk_size=self.chunk_size,
            seed=seed,
        ) as each:
            source = each.data(data)
            for part in each.parts():
                if features is None:
                    features = part.features
                    points = _points(features.count, self.steps)
                    prepared = [replacing(features, source, seed + 1) for _, replacing in wanted]
                rank = ranked(features.by_entry(part.relevance), self.absolute, chance)
                measured = Measured(self.measure, each.question, part.rows)
                for values, (order, _), prepare in zip(found, wanted, prepared, strict=True):
                    change = prepare(part.rows)
                    values.append(
                        self._one(each.question, part.rows, features, order, change, rank, points, measured)
                    )
        assert features is not None
        fraction = _shares(points, features)
        return [Curve(fraction, each.shaped(values)) for values in found]

    def _one(
        self,
        question: Asked,
        rows: TensorDictBase,
        features: Features,
        order: Order,
        change: Change,
        rank: Tensor,
        points: Tensor,
        measured: Measured,
    ) -> Tensor:
        """The curve of some rows, ``[rows, points]``."""
        small, count = question.reads(rows), len(rows)
        values, replaced = [], []
        extent = features.extent.to(rank.device, torch.float64)
        for some in points.split(max(1, self.chunk_size // count)):
            chosen = order(rank, some.to(rank.device)[:, None, None], features.count).flatten(0, 1)
            inputs = small.expand(len(some), *small.batch_size).reshape(-1, *small.batch_size[1:])
            changed = change(inputs, chosen)
            values.append(measured(question.outputs(changed), changed, len(some)))
            replaced.append((chosen.to(torch.float64) @ extent).unflatten(0, (len(some), count)))
        curve = torch.cat(values).T.cpu()
        if features.alike:
            return curve
        share = torch.cat(replaced).T.cpu() / extent.sum().cpu()
        return _interpolated(_shares(points, features), (share - share[:, :1]).abs(), curve)


def ranked(relevance: Tensor, absolute: bool, chance: torch.Generator) -> Tensor:
    """The place of each feature in the order from most to least relevant, drawn by lot among equals.

    Args:
        relevance: ``[rows, features]``.
        absolute: whether to go by its size.
        chance: draws the lots.

    Raises:
        ValueError: relevance is not finite.
    """
    if not bool(relevance.isfinite().all()):
        raise ValueError("relevance has NaN or infinite values, which have no order")
    if absolute:
        relevance = relevance.abs()
    lots = torch.rand(relevance.shape, generator=chance, dtype=torch.float64).argsort(-1).to(relevance.device)
    order = lots.gather(-1, relevance.gather(-1, lots).argsort(dim=-1, descending=True, stable=True))
    places = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)


def _points(count: int, steps: int | None) -> Tensor:
    """How many features are replaced at each point of a curve."""
    if steps is None:
        steps = min(count, 50)
    if steps < 1:
        raise ValueError(f"a curve has at least one step, got steps={steps}")
    return torch.linspace(0, count, min(steps, count) + 1, dtype=torch.float64).round().to(torch.int64)


def _shares(points: Tensor, features: Features) -> Tensor:
    """The shares that a curve is told at, ``[points]``."""
    return points.to(torch.float64) / features.count


def _interpolated(fraction: Tensor, share: Tensor, value: Tensor) -> Tensor:
    """Values that are known at ``share [rows, points]``, which grows from 0 to 1, at ``fraction [points]`` instead."""
    wanted = fraction.expand_as(share).contiguous()
    right = torch.searchsorted(share.contiguous(), wanted).clamp(1, share.shape[1] - 1)
    start, end = share.gather(1, right - 1), share.gather(1, right)
    return value.gather(1, right - 1).lerp(value.gather(1, right), (wanted - start) / (end - start))
