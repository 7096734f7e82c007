"""Rows: where a data set is read from, so many rows at a time, in their order.

A source says how many rows it has and reads a stretch of them. It is opened by each worker for itself, and read as it
lies: what is not looked at is not loaded.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, TypeAlias, runtime_checkable

import torch
from tensordict import LazyStackedTensorDict, TensorDictBase
from torch import Tensor

from tdhook.datasets.identity import Plain, digest_of
from tdhook.files import read_json
from tdhook.keys import parts_of
from tdhook.models.entries import is_batch, plain
from tdhook.rl.saved import load

__all__ = [
    "InMemory",
    "Rows",
    "Saved",
    "Source",
    "Stretch",
    "as_rows",
    "chosen",
    "require_in_order",
    "rows_identity",
]

_STORAGE, _FILLED = "storage", "storage_metadata.json"
_LOOKED_AT = 64
"""Rows that are looked at to tell a source from another."""


@runtime_checkable
class Rows(Protocol):
    """A data set as rows, in order."""

    def __len__(self) -> int:
        """How many rows there are."""

    def read(self, begin: int, end: int) -> TensorDictBase:
        """Rows ``begin`` to ``end``, ``[end - begin, ...]``."""


Source: TypeAlias = "Rows | TensorDictBase | str | os.PathLike[str] | Sequence[TensorDictBase]"
"""Rows; a TensorDict or tensorclass ``[rows, ...]``; a folder where one is saved, or a replay buffer was dumped; a
buffer or storage of torchrl; or whatever has a length and gives a TensorDict for each index, or for a slice of them."""


class Saved:
    """Rows of a memory-mapped TensorDict, or of the storage of a replay buffer that was dumped.

    Args:
        folder: what ``TensorDict.memmap``, ``ReplayBuffer.dumps`` or a storage's ``dumps`` wrote.

    Raises:
        FileNotFoundError: there is none of these.
        ValueError: what is there is cut off, or has no rows.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        home = Path(folder)
        inner = home / _STORAGE
        self.folder = inner if not (home / "meta.json").is_file() and inner.is_dir() else home
        shape = load(self.folder).batch_size
        if not shape:
            raise ValueError(f"{self.folder} holds a TensorDict without a batch axis, which has no rows")
        self._count = _filled(self.folder, shape)

    def __len__(self) -> int:
        return self._count

    def read(self, begin: int, end: int) -> TensorDictBase:
        # Mapped anew each time: what was read before does not count as memory of this process.
        return load(self.folder)[begin:end]


def _filled(folder: Path, shape: torch.Size) -> int:
    """How many rows of a storage are filled: a dump is as long as the storage may become."""
    note = folder / _FILLED
    if not note.is_file():
        return shape[0]
    told = read_json(note)
    count = told.get("len") if isinstance(told, dict) else None
    if not isinstance(count, int) or not 0 <= count <= shape.numel():
        raise ValueError(f"{note} does not say how many rows are filled")
    return count // max(1, shape[1:].numel())


class InMemory:
    """Rows of a TensorDict, ``[rows, ...]``."""

    def __init__(self, td: TensorDictBase) -> None:
        if not td.batch_size:
            raise ValueError("the source is a TensorDict without a batch axis, which has no rows")
        self.td = td

    def __len__(self) -> int:
        return int(self.td.batch_size[0])

    def read(self, begin: int, end: int) -> TensorDictBase:
        return self.td[begin:end]


class _Indexed:
    """Rows of whatever can be indexed."""

    def __init__(self, data: Sequence[TensorDictBase]) -> None:
        self._data = data

    def __len__(self) -> int:
        return len(self._data)

    def read(self, begin: int, end: int) -> TensorDictBase:
        try:
            found: object = self._data[begin:end]
        except TypeError:  # no slices
            found = None
        if isinstance(found, TensorDictBase):
            return found
        each = [self._data[i] for i in range(begin, end)]
        odd = next((one for one in each if not is_batch(one)), None)
        if odd is not None:
            raise TypeError(f"a source gives TensorDicts, and this one gave {type(odd).__name__}")
        return LazyStackedTensorDict.maybe_dense_stack([*map(plain, each)])


class Stretch:
    """Rows of a source that follow each other.

    Args:
        rows: all of them.
        begin: the number of the first.
        count: how many there are.

    Attributes:
        before: how many rows are before the first, which are read by negative numbers.
    """

    def __init__(self, rows: Rows, begin: int, count: int) -> None:
        self._rows, self.before, self._count = rows, begin, count

    def __len__(self) -> int:
        return self._count

    def read(self, begin: int, end: int) -> TensorDictBase:
        return self._rows.read(self.before + begin, self.before + end)


class _Chosen:
    """Some rows of a source."""

    def __init__(self, rows: Rows, index: Tensor) -> None:
        self._rows, self._index = rows, index

    def __len__(self) -> int:
        return len(self._index)

    def read(self, begin: int, end: int) -> TensorDictBase:
        wanted = self._index[begin:end]
        if not len(wanted):
            return self._rows.read(0, 0)
        # Rows that follow each other are read together.
        ends = (wanted.diff() != 1).nonzero()[:, 0] + 1
        parts = torch.tensor_split(wanted, ends)
        return torch.cat([self._rows.read(int(part[0]), int(part[-1]) + 1) for part in parts])


def as_rows(source: Source) -> Rows:
    """Rows of a source.

    Raises:
        FileNotFoundError: there is no such folder.
        TypeError: it is no source.
    """
    storage = getattr(source, "_storage", None)
    if isinstance(source, str | os.PathLike):
        return Saved(source)
    if is_batch(source):
        return InMemory(plain(source))
    if isinstance(source, Rows):
        return source
    if isinstance(storage, TensorDictBase):  # a storage of torchrl
        return InMemory(storage[: _count_of(source, storage)])
    if storage is not None:  # a buffer: of its storage
        return as_rows(storage)
    if hasattr(source, "__len__") and hasattr(source, "__getitem__"):
        return _Indexed(source)
    raise TypeError(
        f"a source is a TensorDict, a folder of one, a replay buffer, or has len() and read(begin, end); this is a "
        f"{type(source).__name__}"
    )


def _count_of(storage: object, filled: TensorDictBase) -> int:
    count: int = len(storage)  # type: ignore[arg-type]
    each: int = filled.batch_size[1:].numel()
    return count // max(1, each)


def chosen(rows: Rows, which: slice | range | Sequence[int] | Tensor | None) -> Rows:
    """The rows that are asked for.

    Args:
        rows: all of them.
        which: their numbers, in the order in which they are explained, or truth values, one for each row.

    Raises:
        IndexError: there is no such row.
        TypeError: these are no numbers.
    """
    if which is None:
        return rows
    count = len(rows)
    if isinstance(which, slice):
        which = range(*which.indices(count))
    index = _as_index(which)
    if index.dtype is torch.bool and index.shape == (count,):
        index = index.nonzero()[:, 0]
    if index.dim() != 1 or index.is_floating_point() or index.dtype is torch.bool:
        raise TypeError(f"rows= is a slice, row numbers, or a truth value for each of the {count} rows")
    odd = index[(index < 0) | (index >= count)]
    if len(odd):
        raise IndexError(f"rows= names row {int(odd[0])}, and the source has {count}: rows count from 0")
    if len(index) and not bool((index.diff() != 1).any()):
        return Stretch(rows, int(index[0]), len(index))
    return _Chosen(rows, index.long())


def require_in_order(rows: Rows) -> None:
    """Make sure that each row is the one after that before it, as far as rows were chosen.

    Raises:
        ValueError: it is not.
    """
    if isinstance(rows, _Chosen):
        raise ValueError(
            "in_order=True compares each row with the one before it, and rows= names rows that do not follow each "
            "other: give a stretch of them, rows=slice(10, 50), or a source that has them in this order"
        )


def _as_index(which: range | Sequence[int] | Tensor) -> Tensor:
    """Numbers or truth values as a tensor; one without axes where these are none."""
    try:
        return torch.as_tensor(
            which, dtype=torch.int64 if isinstance(which, range) or not len(which) else None
        )
    except (TypeError, ValueError, RuntimeError):
        return torch.tensor(0)


def rows_identity(rows: Rows) -> dict[str, Plain]:
    """Which rows they are, by their number, their entries, and the bytes of some of them."""
    count = len(rows)
    looked_at = (
        sorted({round(i * (count - 1) / (_LOOKED_AT - 1)) for i in range(_LOOKED_AT)}) if count else []
    )
    samples = [rows.read(i, i + 1).clone() for i in looked_at]  # a copy: what is mapped around it is not held
    first = samples[0] if samples else rows.read(0, 0)
    entries: dict[str, Plain] = {}
    for key in sorted(_tensors(first), key=parts_of):
        value = first.get(key)
        entries[".".join(parts_of(key))] = [str(value.dtype), *value.shape[1:]]
    read = (one.get(key) for one in samples for key in sorted(_tensors(one), key=parts_of))
    return {"rows": count, "batch": list(first.batch_size[1:]), "entries": entries, "digest": digest_of(read)}


def _tensors(td: TensorDictBase) -> list[tuple[str, ...] | str]:
    return [key for key, value in td.items(True, True) if isinstance(value, Tensor)]
