"""Players: features of values that a model is asked about with some of them there and the others not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor

from tdhook.keys import under
from tdhook.tape.conditions import is_traced

__all__ = ["WHOLE", "Grouping", "Numbering", "Players", "as_numbering"]

WHOLE = "whole"

OneGrouping: TypeAlias = "Tensor | list[Any] | str | Callable[[torch.Size], Tensor]"
Grouping: TypeAlias = "OneGrouping | Mapping[NestedKey, OneGrouping] | None"
"""For each entry of a value the number of its feature, of the shape of one element of the batch; negative ones are left
alone, and truth values say which entries count, each as a feature of its own. Or lists of these; or a function of that
shape that gives the numbers, as ``functools.partial(patches, size=12)``; or ``"whole"``: the value is one feature. Or
these by key, where equal numbers of different keys are different features. By default each entry is a feature."""


@dataclass(frozen=True, eq=False)
class Numbering:
    """Numbers of features without gaps.

    Attributes:
        numbers: ``[*shape]``; ``count`` for entries left alone.
        count: how many features there are.
        rest: whether entries are left alone.
    """

    numbers: Tensor
    count: int
    rest: bool

    @staticmethod
    def of(groups: Tensor) -> Numbering:
        """What a user gives.

        Raises:
            TypeError: groups are neither numbers nor truth values.
            ValueError: they leave no feature.
        """
        if groups.is_floating_point() or groups.is_complex():
            raise TypeError(f"features are numbers or truth values for each entry, got {groups.dtype}")
        if groups.dtype is torch.bool:
            own = torch.where(groups.flatten(), torch.arange(groups.numel(), device=groups.device), -1)
        else:
            own = groups.flatten().to(torch.int64)
        known, place = own.unique(return_inverse=True)
        rest = int((known < 0).sum())
        count = len(known) - rest
        if not count:
            raise ValueError(f"features of shape {list(groups.shape)} leave nothing to replace")
        numbers = torch.where(own < 0, count, place - rest).reshape(groups.shape)
        return Numbering(numbers, count, rest > 0)

    @staticmethod
    def each(shape: Sequence[int]) -> Numbering:
        """Each entry a feature."""
        count = torch.Size(shape).numel()
        return Numbering(torch.arange(count).reshape((*shape,)), count, False)

    def repeated(self, shape: Sequence[int]) -> Numbering:
        """The same features anew at each place of axes before, ``[*shape, *own]``."""
        times = torch.Size(shape).numel()
        place = torch.arange(times, device=self.numbers.device).reshape((*shape, *(1,) * self.numbers.dim()))
        count = times * self.count
        shifted = self.numbers + place * self.count
        return Numbering(
            torch.where(self.numbers == self.count, count, shifted) if self.rest else shifted,
            count,
            self.rest,
        )


OneNumbering: TypeAlias = "Numbering | str | Callable[[torch.Size], Tensor]"


@dataclass
class Known:
    """Features that were numbered before, by function and shape: a graph is traced with these."""

    found: dict[tuple[object, tuple[int, ...]], tuple[list[int], int, bool]] = field(default_factory=dict)

    def of(self, function: Callable[[torch.Size], Tensor], shape: torch.Size) -> Numbering:
        """The numbering that a function gives of a shape, which may be another one in each call."""
        entry = (function, tuple(shape))
        if entry not in self.found or not is_traced():
            given = function(shape)
            if given.shape != shape:
                raise ValueError(
                    f"the function that numbers features gave the shape {list(given.shape)} for values of shape "
                    f"{list(shape)}"
                )
            made = Numbering.of(given)
            self.found[entry] = (made.numbers.flatten().tolist(), made.count, made.rest)
        numbers, count, rest = self.found[entry]
        return Numbering(torch.tensor(numbers).reshape(shape), count, rest)


def as_numbering(
    features: Grouping,
) -> Mapping[NestedKey, OneNumbering] | OneNumbering | None:
    """What a user gives as features, with numbers without gaps."""
    if features is None:
        return None
    if isinstance(features, Mapping):
        return {unravel_key(key): _one(given) for key, given in features.items()}
    return _one(features)


def _one(given: OneGrouping) -> OneNumbering:
    if isinstance(given, Tensor):
        return Numbering.of(given)
    if isinstance(given, list):  # as files have numbers
        return Numbering.of(torch.tensor(given))
    if not callable(given) and given != WHOLE:
        raise ValueError(
            f"features={given!r} is neither {WHOLE!r}, numbers by entry nor a function that gives them"
        )
    return given


@dataclass(frozen=True, eq=False)
class Players:
    """The features of some values, those of all keys in one line.

    Attributes:
        numbers: by key, ``[size]``, which feature each entry belongs to; ``count`` for entries left alone.
        count: the number of features.
        rest: whether entries are left alone.
        first: by key, the number of its first feature, where each entry is a feature of its own.
    """

    numbers: dict[NestedKey, Tensor]
    count: int
    rest: bool
    first: dict[NestedKey, int]

    @staticmethod
    def of(
        values: Mapping[NestedKey, Tensor],
        others: int,
        features: Mapping[NestedKey, OneNumbering] | OneNumbering | None,
        known: Known,
    ) -> Players:
        """The features of some values.

        Args:
            values: by key, ``[rows, *others, *shape]``.
            others: how many axes of the batch belong to the features, as time does where steps depend on each other.
            features: numbers of one element; those of ``[*shape]`` hold at each place of the others.
            known: what was numbered before.

        Raises:
            KeyError: features are given for what is not there.
            ValueError: features do not fit.
        """
        plain = {under(key): key for key in values}
        if isinstance(features, Mapping):
            for key in features:
                if key not in plain:
                    raise KeyError(
                        f"features are given for {key!r}, which is none of {', '.join(map(repr, plain))}"
                    )
        elif features is not None and isinstance(features, Numbering) and len(values) > 1:
            raise ValueError(
                f"features are given for one value, and there are {', '.join(map(repr, plain))}: give them by key"
            )
        each: dict[NestedKey, Numbering] = {}
        for name, key in plain.items():
            given = features.get(name) if isinstance(features, Mapping) else features
            each[key] = _fitting(given, name, values[key].shape[1:], others, known)
        total = sum(own.count for own in each.values())
        numbers: dict[NestedKey, Tensor] = {}
        first: dict[NestedKey, int] = {}
        start = 0
        for name, key in plain.items():
            own = each[key]
            found = own.numbers.flatten().to(values[key].device)
            numbers[key] = (
                torch.where(found == own.count, total, found + start) if own.rest else found + start
            )
            given = features.get(name) if isinstance(features, Mapping) else features
            if given is None:
                first[key] = start
            start += own.count
        return Players(numbers, total, any(own.rest for own in each.values()), first)

    def spread_out(self, key: NestedKey, worth: Tensor) -> Tensor:
        """What features are worth, ``[..., features]``, split evenly over their entries: ``[..., size]``."""
        numbers = self.numbers[key]
        if key in self.first:
            return worth[..., self.first[key] : self.first[key] + len(numbers)]
        extent = worth.new_zeros(self.count + 1).index_add_(0, numbers, worth.new_ones(len(numbers)))
        share = worth / extent[: self.count].clamp(min=1)  # features of other values have no entry here
        return (F.pad(share, (0, 1)) if self.rest else share).index_select(-1, numbers)

    def present(self, key: NestedKey, present: Tensor) -> Tensor:
        """How far each entry is there, ``[..., size]``, given how far features are, ``[..., features]``."""
        numbers = self.numbers[key]
        if key in self.first:
            return present[..., self.first[key] : self.first[key] + len(numbers)]
        padded = F.pad(present, (0, 1), value=1) if self.rest else present
        return padded.index_select(-1, numbers)


def _fitting(
    given: OneNumbering | None, key: NestedKey, shape: torch.Size, others: int, known: Known
) -> Numbering:
    own = shape[others:]
    if given is None:
        return Numbering.each(shape)
    if isinstance(given, str):
        return Numbering(torch.zeros(tuple(shape), dtype=torch.int64), 1, False)
    made = given if isinstance(given, Numbering) else known.of(given, own)
    if made.numbers.shape == shape:
        return made
    if made.numbers.shape != own:
        raise ValueError(
            f"the features of {key!r} have shape {list(made.numbers.shape)}; one element of the batch has "
            f"{list(own)}" + (f", or {list(shape)} with the axes that belong to it" if others else "")
        )
    return made.repeated(shape[:others])
