"""Reducers: moments, histograms with quantiles, the most extreme rows, and a sample, of all rows or by group."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import torch
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook.datasets.reducing import By, Part, Piece, Reducer, aligned, groups_of, labels_of

__all__ = ["Histogram", "Moments", "Reservoir", "TopRows"]

Score = Callable[[Tensor], Tensor]


class Moments(Reducer):
    """Mean, variance, mean of absolute values, smallest and largest relevance of each feature.

    Sums are those of deviations from the mean of each part (Chan, Golub, LeVeque 1979), in double precision.

    Shapes:
        ``count [groups]``; ``mean``, ``variance``, ``absolute``, ``least``, ``most`` ``[groups, *axes, *features]``.
    """

    def part(self, piece: Piece) -> Part:
        values = self.of(piece).to(torch.float64, copy=True)
        groups, place = groups_of(labels_of(self.by, piece))
        where = place.reshape(-1, *(1,) * (values.dim() - 1)).expand_as(values)
        found = _no_moments(groups, values.shape[1:])
        found["count"] += torch.bincount(place, minlength=len(groups))
        by_row = found["count"].reshape(-1, *(1,) * (values.dim() - 1)).double()
        found["least"].scatter_reduce_(0, where, values, "amin")
        found["most"].scatter_reduce_(0, where, values, "amax")
        found["absolute"].scatter_add_(0, where, values.abs()).div_(by_row)
        mean = found["mean"].scatter_add_(0, where, values).div_(by_row)
        deviations = values.sub_(mean[place]).square_()  # in place of the values: rows may be large
        found["apart"].scatter_add_(0, where, deviations)
        return found

    def merged(self, parts: Iterable[Part]) -> Part:
        given = list(parts)
        groups, places = aligned(given)
        shape = given[0]["mean"].shape[1:]
        found, ones = _no_moments(groups, shape), (1,) * len(shape)
        for part, place in zip(given, places, strict=True):
            before = found["count"][place].reshape(-1, *ones).double()
            new = part["count"].reshape(-1, *ones).double()
            weight = new / (before + new)
            step = part["mean"] - found["mean"][place]
            found["apart"][place] += part["apart"] + step**2 * before * weight
            found["mean"][place] += step * weight
            found["absolute"][place] += (part["absolute"] - found["absolute"][place]) * weight
            found["least"][place] = torch.minimum(found["least"][place], part["least"])
            found["most"][place] = torch.maximum(found["most"][place], part["most"])
            found["count"][place] += part["count"]
        return found

    def result(self, part: Part) -> dict[str, Tensor]:
        ones = (1,) * (part["mean"].dim() - 1)
        variance = part["apart"] / part["count"].reshape(-1, *ones)
        kept = ("group", "count", "mean", "absolute", "least", "most")
        return {**{name: part[name] for name in kept}, "variance": variance}


def _no_moments(groups: Tensor, features: torch.Size) -> Part:
    """The moments of no rows, of each group."""
    zeros = torch.zeros((len(groups), *features), dtype=torch.float64)
    return {
        "group": groups,
        "count": torch.zeros(len(groups), dtype=torch.int64),
        "mean": zeros,
        "apart": zeros.clone(),
        "absolute": zeros.clone(),
        "least": torch.full_like(zeros, torch.inf),
        "most": torch.full_like(zeros, -torch.inf),
    }


_OCTAVE = 8
_LOWEST, _HIGHEST = -64, 64
_SIDE = (_HIGHEST - _LOWEST) * _OCTAVE
"""Bins of one sign, eight for each doubling of the size, from 2^-64 to 2^64; the outermost have all that is beyond."""
_MOST_FEATURES = 1024


class Histogram(Reducer):
    """How often relevance has which size, on a logarithmic scale with a sign, and quantiles of it.

    Bins are exact, and counts are whole numbers: they merge in any order. A quantile is right to within its bin, an
    eighth of a doubling from 2^-64 to 2^64. What is smaller is in one bin with the first of these, which begins at 0;
    what is larger is in one with the last, and a quantile there is infinite.

    Args:
        pooled: whether all features are counted together, as the pixels of an image; otherwise each for itself.
        **options: those of :class:`~tdhook.datasets.reducing.Reducer`.

    Shapes:
        ``count [groups, *features, bins]`` or ``[groups, bins]``, ``edges [bins + 1]``; ``quantiles [groups,
        *features, 5]`` for 1, 25, 50, 75 and 99 per cent.
    """

    QUANTILES = (0.01, 0.25, 0.5, 0.75, 0.99)

    def __init__(
        self,
        key: NestedKey | None = None,
        *,
        by: By | None = None,
        name: str | None = None,
        pooled: bool = False,
    ) -> None:
        super().__init__(key, by=by, name=name)
        self.pooled = pooled

    def part(self, piece: Piece) -> Part:
        values = self.of(piece).double().cpu()
        groups, place = groups_of(labels_of(self.by, piece))
        features = values.shape[1:]
        if not self.pooled and features.numel() > _MOST_FEATURES:
            raise ValueError(
                f"a histogram for each of {features.numel()} features is too much: count them together, "
                f"Histogram(pooled=True), or fewer of them"
            )
        bins = _bins(values)
        rows = place.reshape(-1, *(1,) * len(features)).expand_as(values)
        if self.pooled:
            cells, each = rows, 1
        else:
            each = max(1, features.numel())
            cells = rows * each + torch.arange(each).reshape(features)
        wide = 2 * _SIDE + 1
        counted = torch.bincount((cells * wide + bins).reshape(-1), minlength=len(groups) * each * wide)
        shape = (len(groups), *(() if self.pooled else features), wide)
        return {"group": groups, "count": counted.reshape(shape)}

    def merged(self, parts: Iterable[Part]) -> Part:
        given = list(parts)
        groups, places = aligned(given)
        count = torch.zeros((len(groups), *given[0]["count"].shape[1:]), dtype=torch.int64)
        for part, place in zip(given, places, strict=True):
            count[place] += part["count"]
        return {"group": groups, "count": count}

    def result(self, part: Part) -> dict[str, Tensor]:
        count, middles = part["count"], _middles()
        reached = count.cumsum(-1)
        total = reached[..., -1:]
        wanted = torch.tensor(self.QUANTILES, dtype=torch.float64) * total
        at = torch.searchsorted(reached.double(), wanted.clamp(min=0.5)).clamp(max=len(middles) - 1)
        return {**part, "edges": _edges(), "quantiles": middles[at]}


def _bins(values: Tensor) -> Tensor:
    """The bin of each value: below the middle one for negative values, above it for positive ones."""
    mantissa, exponent = torch.frexp(values.abs())
    inside = ((mantissa * 2 - 1) * _OCTAVE).long().clamp(0, _OCTAVE - 1)
    place = ((exponent.long() - 1 - _LOWEST) * _OCTAVE + inside).clamp(0, _SIDE - 1) + 1
    return _SIDE + torch.where(values == 0, 0, torch.where(values < 0, -place, place))


def _positive_edges() -> Tensor:
    octaves = torch.arange(_LOWEST, _HIGHEST, dtype=torch.float64)
    inside = 1 + torch.arange(_OCTAVE, dtype=torch.float64) / _OCTAVE
    found = (torch.exp2(octaves)[:, None] * inside).reshape(-1)
    found[0] = 0
    return torch.cat([found, torch.tensor([torch.inf], dtype=torch.float64)])


def _edges() -> Tensor:
    above = _positive_edges()
    return torch.cat([-above.flip(0), above])


def _middles() -> Tensor:
    above = _positive_edges()
    middle = (above[1:] + above[:-1]) / 2
    return torch.cat([-middle.flip(0), torch.zeros(1, dtype=torch.float64), middle])


class _FewRows(Reducer):
    """So many rows of each group: those that are the first in an order."""

    def __init__(self, count: int, key: NestedKey | None, by: By | None, name: str | None) -> None:
        super().__init__(key, by=by, name=name)
        if count < 1:
            raise ValueError(f"at least one row is kept, got count={count}")
        self.count = count

    @abstractmethod
    def order(self, part: Part) -> Tensor:
        """The places of rows ``[rows]``, in the order of their groups, and in each the best first."""

    def merged(self, parts: Iterable[Part]) -> Part:
        few: Part | None = None
        for part in parts:
            both = part if few is None else {name: torch.cat([few[name], part[name]]) for name in part}
            few = self.few(both)
        return few or {}

    def few(self, part: Part) -> Part:
        """The first rows of each group."""
        order = self.order(part)
        group = part["group"][order]
        first = torch.searchsorted(group, group)  # where the group of each begins
        kept = order[torch.arange(len(order)) - first < self.count]
        return {name: value[kept] for name, value in part.items()}


class TopRows(_FewRows):
    """The rows with the largest score of their relevance, of each group: reference samples (Achtibat et al. 2023).

    Args:
        count: how many.
        score: ``"sum"`` of all relevance, ``"absolute"`` (the sum of absolute values), ``"most"`` (the largest value),
            a number (that feature), or a function of ``[rows, *features]`` that gives ``[rows]``.
        with_rows: whether the relevance of these rows is kept too.
        **options: those of :class:`~tdhook.datasets.reducing.Reducer`.

    Shapes:
        ``group``, ``row``, ``score [found]``, in order of the groups, then of the score, the largest first; of equal
        ones the first row. ``relevance [found, *features]``.
    """

    def __init__(
        self,
        count: int,
        key: NestedKey | None = None,
        *,
        score: Literal["sum", "absolute", "most"] | int | Score = "sum",
        with_rows: bool = True,
        by: By | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(count, key, by, name)
        if isinstance(score, str) and score not in _SCORES:
            raise ValueError(f"score={score!r} is none of {', '.join(_SCORES)}, a feature or a function")
        self.score, self.with_rows = score, with_rows

    def part(self, piece: Piece) -> Part:
        values = self.of(piece).cpu()
        found = self._scores(values).double()
        part = {"group": labels_of(self.by, piece), "row": piece.index.cpu(), "score": found}
        if self.with_rows:
            part["relevance"] = values
        return self.few(part)

    def order(self, part: Part) -> Tensor:
        return _sorted_by(part["group"], -part["score"], part["row"])

    def result(self, part: Part) -> dict[str, Tensor]:
        return dict(part)

    def _scores(self, values: Tensor) -> Tensor:
        flat = values.reshape(len(values), -1)
        if callable(self.score):
            found = self.score(values)
            if found.shape != (len(values),):
                raise ValueError(
                    f"the score gives {tuple(found.shape)} for {len(values)} rows; it is to give one number each"
                )
            return found
        if isinstance(self.score, int):
            if not -flat.shape[1] <= self.score < flat.shape[1]:
                raise IndexError(f"score={self.score}, and there are {flat.shape[1]} features")
            return flat[:, self.score]
        return _SCORES[self.score](flat)


_SCORES: dict[str, Score] = {
    "sum": lambda flat: flat.sum(-1),
    "absolute": lambda flat: flat.abs().sum(-1),
    "most": lambda flat: flat.amax(-1),
}


class Reservoir(_FewRows):
    """Rows drawn by chance, of each group, the same ones for the same seed, with their relevance.

    Which rows are drawn depends on their numbers and the seed alone: the same rows are drawn for each checkpoint.

    Args:
        count: how many.
        seed: of the draw.
        **options: those of :class:`~tdhook.datasets.reducing.Reducer`.

    Shapes:
        ``group``, ``row [found]`` in order of the groups, then of the rows; ``relevance [found, *features]``.
    """

    def __init__(
        self,
        count: int,
        key: NestedKey | None = None,
        *,
        seed: int = 0,
        by: By | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(count, key, by, name)
        self.seed = seed

    def part(self, piece: Piece) -> Part:
        return self.few(
            {
                "group": labels_of(self.by, piece),
                "row": piece.index.cpu(),
                "chance": _chances(piece.index.cpu(), self.seed),
                "relevance": self.of(piece).cpu(),
            }
        )

    def order(self, part: Part) -> Tensor:
        return _sorted_by(part["group"], part["chance"], part["row"])

    def result(self, part: Part) -> dict[str, Tensor]:
        order = _sorted_by(part["group"], part["row"])
        return {name: value[order] for name, value in part.items() if name != "chance"}


def _chances(rows: Tensor, seed: int) -> Tensor:
    """A number for each row that looks drawn, in [0, 2^62): splitmix64 (Steele, Lea, Flood 2014) of row and seed."""
    x = (rows.long() + 1) * -7046029254386353131 + torch.tensor(seed) * -3335678366873096957
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return (x ^ ((x >> 31) & ((1 << 33) - 1))) & ((1 << 62) - 1)


def _sorted_by(*columns: Tensor) -> Tensor:
    """The order of rows by the first column, then by the second, and so on."""
    order = torch.arange(len(columns[0]))
    for column in reversed(columns):
        order = order[torch.sort(column[order], stable=True).indices]
    return order


def as_names(reducers: Sequence[Reducer]) -> dict[str, Reducer]:
    """Reducers by name.

    Raises:
        TypeError: they are no list of reducers.
        ValueError: two have one name.
    """
    named: dict[str, Reducer] = {}
    if isinstance(reducers, Reducer) or not all(isinstance(one, Reducer) for one in reducers):
        raise TypeError(f"reduce is a list of reducers, like [Moments()], got {reducers!r}")
    for reducer in reducers:
        if reducer.name in named:
            raise ValueError(f"two reducers are called {reducer.name!r}: give one of them another name=")
        named[reducer.name] = reducer
    return named
