"""Games: what a model says where some features are there, and the others are those of a reference."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import torch
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook.passes.rows import some_rows
from tdhook.passes.variants import Variants
from tdhook.perturbing.players import Players

__all__ = ["Game", "Present", "Told"]

Present: TypeAlias = "Callable[[range], Tensor]"
"""Given numbers of coalitions, how far each feature is there: ``[coalitions, features]``, or ``[coalitions, rows,
features]``; truth values, or numbers from 0, which is the reference, to 1."""

Told: TypeAlias = "Callable[[int, int], None]"
"""Told how many of how many coalitions are done."""


class Game:
    """The features of some values as players: what the target is where some of them are there.

    Args:
        variants: asks the model.
        ends: the values, by source.
        start: what takes their place, by source; a source that is not named is left alone.
        axes: the axes of the batch that tell elements apart.
        players: gives the features of values ``[rows, *others, *shape]``, given how many axes are others.
        told: told how far it is.
        empty: the target on all of the reference, ``[*batch]`` or ``[outputs, *batch]``, if that is known.

    Attributes:
        players: the features.
        rows: how many elements there are.
        others: how many axes of the batch belong to the features.
        several: whether several outputs are explained.
        full: the target with all features there, ``[rows]`` or ``[outputs, rows]``.
        notes: what else a method found, by name.
    """

    def __init__(
        self,
        variants: Variants,
        ends: Mapping[NestedKey, Tensor],
        start: Mapping[NestedKey, Tensor],
        axes: Sequence[int],
        players: Callable[[Mapping[NestedKey, Tensor], int], Players],
        told: Told | None = None,
        empty: Tensor | None = None,
    ) -> None:
        self._variants, self._axes, self._told = variants, tuple(axes), told
        self._shapes = {key: x.shape for key, x in ends.items()}
        self._ends = {key: self._by_row(x.detach()) for key, x in ends.items() if key in start}
        self._starts = {key: self._by_row(start[key].detach()) for key in self._ends}
        self.others = len(variants.batch) - len(axes)
        self.players = players(self._ends, self.others)
        self.several = variants.several > 0
        self.full = self._values(variants.values.unsqueeze(0))[0]
        self.rows: int = self.full.shape[-1]
        self.notes: dict[str, Tensor] = {}
        self._empty_by_element = None if self.players.rest else empty

    @property
    def count(self) -> int:
        """How many features there are."""
        return self.players.count

    def __len__(self) -> int:
        """How many elements there are along the first axis that tells them apart."""
        return self._variants.batch[self._axes[0]] if self._axes else 1

    @property
    def empty(self) -> Tensor:
        """The target with no feature there, ``[rows]`` or ``[outputs, rows]``."""
        return self._values(self._on_reference().unsqueeze(0))[0]

    @property
    def rise(self) -> Tensor:
        """How far the target is from what it is on the reference, ``[*batch]`` or ``[outputs, *batch]``."""
        return self._variants.values - self._on_reference()

    @property
    def meeting(self) -> list[int]:
        """The axes of the batch that belong to the features."""
        return [axis for axis in range(len(self._variants.batch)) if axis not in self._axes]

    def _on_reference(self) -> Tensor:
        if self._empty_by_element is None:
            nobody = torch.zeros(1, self.count, dtype=torch.bool)
            (answer,) = self._variants.answers(1, lambda _: self._mixed(self._there(nobody)))
            self._empty_by_element = answer.values[0]
        return self._empty_by_element

    def by_element(self, values: Tensor) -> Tensor:
        """What belongs to elements, ``[outputs, *batch]``, as ``[outputs, rows]``, summed over the rest."""
        return self._gathered(values, 1)

    def value(self, key: NestedKey) -> Tensor:
        """A value as it is, ``[rows, *others, *shape]``."""
        return self._ends[key]

    @property
    def keys(self) -> list[NestedKey]:
        """The sources whose features are players."""
        return list(self._ends)

    def worth(self, count: int, present: Present) -> Tensor:
        """What the target is in some coalitions.

        Args:
            count: how many there are.
            present: which these are.

        Returns:
            ``[coalitions, rows]``, or ``[coalitions, outputs, rows]``.
        """
        return self.worth_of(count, lambda numbers: self._there(present(numbers)))

    def worth_of(self, count: int, there: Callable[[range], Mapping[NestedKey, Tensor]]) -> Tensor:
        """The same, where it is said of each entry how far it is there.

        Args:
            count: how many variants there are.
            there: given numbers of variants, by source ``[variants, *shape]`` or ``[variants, rows, *shape]``, or of
                size one along axes of the shape; a source that is not named stays as it is.
        """
        found = []
        for answer in self._variants.answers(count, lambda numbers: self._mixed(there(numbers))):
            found.append(self._values(answer.values))
            if self._told is not None:
                self._told(answer.numbers.stop, count)
        return torch.cat(found) if len(found) > 1 else found[0]

    def by_source(self, worth: Tensor) -> dict[NestedKey, Tensor]:
        """What features are worth, ``[rows, features]`` or ``[outputs, rows, features]``, by source, of its shape."""
        found: dict[NestedKey, Tensor] = {}
        for key, shape in self._shapes.items():
            lead = worth.shape[: worth.dim() - 2]
            if key in self._ends:
                spread = self.players.spread_out(key, worth)
                own = self._as_source(spread.reshape((*lead, *self._ends[key].shape)), shape, len(lead))
                found[key] = own.to(self._ends[key].dtype)
            else:
                found[key] = worth.new_zeros((*lead, *shape))
        return found

    def by_place(self, pictures: Tensor, key: NestedKey) -> Tensor:
        """Pictures ``[..., rows, *others, height, width]`` by entry, split evenly over the channels of a value."""
        shape = self._ends[key].shape[1:]
        channels = shape[self.others : -2]
        lead = pictures.shape[: pictures.dim() - self.others - 2]
        apart = pictures.reshape((*lead, *shape[: self.others], *(1,) * len(channels), *shape[-2:]))
        return (apart / channels.numel()).expand((*lead, *shape)).flatten(len(lead))

    def among(self, rows: Tensor) -> Game | None:
        """The same for some elements along the first axis; ``None`` where these are not told apart by it."""
        variants = self._variants.among(rows) if self._axes[:1] == (0,) else None
        if variants is None:
            return None
        some, first = copy.copy(self), self._variants.batch[0]
        some._variants, some.notes = variants, {}
        if self._empty_by_element is not None:
            some._empty_by_element = self._empty_by_element.index_select(self._variants.several, rows)
        some._ends = {key: some_rows(x, first, rows) for key, x in self._ends.items()}
        some._starts = {key: some_rows(x, first, rows) for key, x in self._starts.items()}
        lead = self.full.shape[:-1]
        some.full = self.full.reshape(*lead, first, -1).index_select(-2, rows).flatten(-2)
        some.rows = some.full.shape[-1]
        some._shapes = {
            key: torch.Size([shape[0] // first * len(rows), *shape[1:]])
            for key, shape in self._shapes.items()
        }
        return some

    def _there(self, present: Tensor) -> dict[NestedKey, Tensor]:
        """How far each entry is there, given how far features are."""
        found = {}
        for key, end in self._ends.items():
            share = self.players.present(key, present.to(end.device))
            found[key] = share.reshape((*share.shape[:-1], *end.shape[1:]))
        return found

    def _mixed(self, there: Mapping[NestedKey, Tensor]) -> dict[NestedKey, Tensor]:
        """Variants of sources, ``[variants, *source]``."""
        found = {}
        for key, share in there.items():
            start, end = self._starts[key], self._ends[key]
            hard = share.dtype is torch.bool
            share = share.to(end.device) if hard else share.to(end)
            by_row = share.unsqueeze(1) if share.dim() == end.dim() else share
            mixed = torch.where(by_row, end, start) if hard else torch.lerp(start, end, by_row)
            found[key] = self._as_source(mixed, self._shapes[key], 1)
        return found

    def _values(self, values: Tensor) -> Tensor:
        """Values ``[variants, *batch]`` or ``[variants, outputs, *batch]``, by row, summed over the rest."""
        return self._gathered(values, 1 + (self._variants.several > 0))

    def _gathered(self, values: Tensor, before: int) -> Tensor:
        own = [before + axis for axis in self._axes]
        moved = values.movedim(own, list(range(before, before + len(own))))
        shape = moved.shape[before : before + len(own)]
        rows = moved.reshape(*moved.shape[:before], shape.numel(), -1)
        return rows.squeeze(-1) if rows.shape[-1] == 1 else rows.sum(-1)

    def _by_row(self, x: Tensor) -> Tensor:
        """A source as ``[rows, *others, *shape]``."""
        batch = self._variants.batch
        apart = self._in_batch_shape(x, 0, batch)
        moved = apart.movedim(self._axes, tuple(range(len(self._axes))))
        return moved.flatten(0, len(self._axes) - 1) if self._axes else moved.unsqueeze(0)

    def _as_source(self, x: Tensor, shape: torch.Size, after: int) -> Tensor:
        """``[rows, *others, *shape]`` as a source is, after so many more axes."""
        axes, batch = self._axes, self._variants.batch
        lead = x.shape[:after]
        apart = x.reshape((*lead, *(batch[axis] for axis in axes), *x.shape[after + 1 :]))
        places = [after + axis for axis in axes]
        moved = apart.movedim(list(range(after, after + len(axes))), places)
        return moved.reshape((*lead, *shape))

    @staticmethod
    def _in_batch_shape(x: Tensor, after: int, batch: torch.Size) -> Tensor:
        """A source with the axes of the batch apart, which inner values may have in one."""
        if x.shape[after : after + len(batch)] == batch:
            return x
        return x.reshape((*x.shape[:after], *batch, *x.shape[after + 1 :]))
