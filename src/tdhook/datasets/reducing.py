"""Reducing: what is made of all rows in the workers, so that the rows themselves need not be kept.

Each reducer makes a part of the rows of each chunk, as named arrays, and merges parts in the order of the chunks: the
result is the same, bit by bit, whoever made which part, and when.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor

from tdhook.datasets.faults import rows_named
from tdhook.keys import known_keys

__all__ = ["By", "Part", "Piece", "Reducer", "add_part", "groups_of", "labels_of"]

By: TypeAlias = "NestedKey | Callable[[TensorDictBase], Tensor]"
"""What rows are told apart by: an entry of the source (an action, ``("next", "done")``), or a function of rows that
gives a whole number or truth value for each."""

Part: TypeAlias = "dict[str, Tensor]"
"""What a reducer knows of some rows: tensors by name."""


@dataclass(frozen=True)
class Piece:
    """Some rows, explained.

    Attributes:
        data: the rows as the source has them, ``[rows, ...]``.
        index: their numbers among those that are explained, ``[rows]``.
        relevance: by input, ``[rows, *axes, *features]``.
        entries: all that was found, by key, ``[rows, ...]``.
    """

    data: TensorDictBase
    index: Tensor
    relevance: Mapping[NestedKey, Tensor]
    entries: Mapping[NestedKey, Tensor]


class Reducer(ABC):
    """What is made of all rows.

    Args:
        key: the input whose relevance it is made of; by default the only one.
        by: rows are told apart by this, and each group has a result; by default all rows are one group.
        name: what the result is called; by default the class in small letters.
    """

    def __init__(
        self, key: NestedKey | None = None, *, by: By | None = None, name: str | None = None
    ) -> None:
        self.key = None if key is None else unravel_key(key)
        self.by = by if by is None or callable(by) else unravel_key(by)
        self.name = type(self).__name__.lower() if name is None else name

    @property
    def reads(self) -> list[NestedKey]:
        """Entries of the source that are read."""
        return [] if self.by is None or callable(self.by) else [self.by]

    @abstractmethod
    def part(self, piece: Piece) -> Part:
        """What is known of some rows."""

    @abstractmethod
    def merged(self, parts: Iterable[Part]) -> Part:
        """What is known of all rows that parts are of, in their order."""

    @abstractmethod
    def result(self, part: Part) -> dict[str, Tensor]:
        """What a part says, in the words of the field."""

    def of(self, piece: Piece) -> Tensor:
        """The relevance that it is made of, ``[rows, *axes, *features]``.

        Raises:
            KeyError: there is none of the key, or several and none is named.
        """
        found = piece.relevance
        if self.key is None and len(found) == 1:
            return _as_numbers(next(iter(found.values())))
        if self.key is None or self.key not in found:
            asked = "no key is named" if self.key is None else f"{self.key!r} is named"
            raise KeyError(f"{asked}, and there is relevance of {', '.join(map(repr, found))}: give it key=")
        return _as_numbers(found[self.key])


def _as_numbers(x: Tensor) -> Tensor:
    """Off the device, and in single precision at least, which every file format knows."""
    return x.cpu() if x.dtype in (torch.float32, torch.float64) else x.cpu().float()


def add_part(parts: dict[str, Part], reducer: Reducer, piece: Piece) -> None:
    """Add what a reducer knows of some rows to what is known of those before, by its name.

    Raises:
        Exception: the rows cannot be reduced; the message says which, and by what.
    """
    begin, name = int(piece.index[0]), reducer.name
    with rows_named(begin, begin + len(piece.index), f"the reducer {name!r}"):
        new = reducer.part(piece)
        parts[name] = reducer.merged([parts[name], new] if name in parts else [new])


def labels_of(by: By | None, piece: Piece) -> Tensor:
    """The group of each row, ``[rows]``, whole numbers.

    Raises:
        KeyError: the source has no such entry.
        ValueError: what rows are told apart by is not one whole number each.
    """
    rows = len(piece.index)
    if by is None or not rows:  # all of a piece may be padding
        return torch.zeros(rows, dtype=torch.int64)
    if callable(by):
        found: object = by(piece.data)
    else:
        found = piece.data.get(by, None)
        if found is None:
            raise KeyError(f"rows are told apart by {by!r}, and the source has {known_keys(piece.data)}")
    if not isinstance(found, Tensor) or found.is_floating_point() or found.shape[:1] != (rows,):
        raise ValueError(
            f"rows are told apart by whole numbers or truth values, one each, and {by!r} gives "
            f"{getattr(found, 'dtype', type(found).__name__)} of shape {tuple(getattr(found, 'shape', ()))}"
        )
    found = found.cpu()
    flat = found.reshape(rows, -1)
    if flat.shape[1] == 1:
        return flat[:, 0].long()
    one_hot = found.dim() == 2 and bool(
        (flat.long().sum(-1) == 1).all() and (flat.long().amax(-1) == 1).all()
    )
    if one_hot:
        return flat.long().argmax(-1)
    if found.dim() == 2 and bool((flat.long() <= 1).all()):
        odd = flat.long().sum(-1) != 1
        first = int(odd.nonzero()[0])
        raise ValueError(
            f"rows are told apart by one value each, and {by!r} is one-hot but in {int(odd.sum())} of these rows: row "
            f"{int(piece.index[first])} has {int(flat[first].long().sum())} of {flat.shape[1]}; where an actor "
            "takes all of several that are equally good, decide by a function, by=lambda rows: ..."
        )
    raise ValueError(f"rows are told apart by one value each, and {by!r} gives {tuple(found.shape[1:])}")


def groups_of(labels: Tensor) -> tuple[Tensor, Tensor]:
    """The groups that there are, ``[groups]`` in order, and of each row the place of its group, ``[rows]``."""
    groups, inverse = torch.unique(labels, sorted=True, return_inverse=True)
    return groups, inverse


def aligned(parts: Sequence[Part]) -> tuple[Tensor, list[Tensor]]:
    """All groups of several parts, and where those of each are among them."""
    groups = torch.unique(torch.cat([part["group"] for part in parts]), sorted=True)
    return groups, [torch.searchsorted(groups, part["group"]) for part in parts]
