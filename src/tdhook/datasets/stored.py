"""What lies in a job folder, as its manifest says: enough to read results, without the policy or the source."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from tensordict.utils import NestedKey, unravel_key
from torch import Tensor

from tdhook.datasets.folder import JobFolder
from tdhook.datasets.identity import Plain, difference
from tdhook.datasets.layout import Layout, checksums, name_of
from tdhook.datasets.reducers import Histogram, Moments, Reservoir, TopRows
from tdhook.datasets.reducing import Reducer
from tdhook.datasets.rows import Rows, rows_identity
from tdhook.datasets.unit_rows import UnitRows
from tdhook.datasets.units import Units

__all__ = ["Stored", "named", "require_same_source", "stored_in"]

_LARGEST = 2**48
_KNOWN: dict[str, type[Reducer]] = {
    f"{cls.__module__}.{cls.__qualname__}": cls for cls in (Histogram, Moments, Reservoir, TopRows, UnitRows)
}


@dataclass(frozen=True)
class Stored:
    """What a job writes, and where.

    Attributes:
        folder: where it lies.
        units: which rows are in which chunk.
        piece: how many rows are looked at together.
        layout: the entries that are written.
        keeps: whether anything is kept of rows.
        compressed: whether rows are in compressed blocks.
        checkpoints: the names of the checkpoints; none if only the weights of the model are explained.
        reducers: what is made of all rows, by name.
        attribution_key: where relevance is in rows.
    """

    folder: JobFolder
    units: Units
    piece: int
    layout: Layout
    keeps: bool
    compressed: bool
    checkpoints: tuple[str, ...]
    reducers: Mapping[str, Reducer]
    attribution_key: NestedKey

    @property
    def batch(self) -> tuple[int, ...]:
        """The batch size of all rows."""
        several = len(self.checkpoints)
        return (several, self.units.rows) if several else (self.units.rows,)

    @property
    def maps_rows(self) -> bool:
        """Whether rows are written into memory-mapped files."""
        return bool(self.layout.entries) and not self.compressed

    def is_as_written(self, unit: int) -> bool:
        """Whether what lies on the disk of a chunk is what was written."""
        try:
            if self.reducers:
                self.folder.read_part(unit)
            return self.checksums(unit) == self.folder.told_of(unit)["crc32"]
        except (ValueError, FileNotFoundError):  # cut off, or gone
            return False

    def checksums(self, unit: int) -> dict[str, int]:
        """Checksums of what lies on the disk of a chunk."""
        begin, end = self.units.span(unit)
        if not self.layout.entries:
            return {}
        if self.compressed:
            return named(checksums(self.folder.read_block(unit, end - begin, self.layout)))
        first = self.units.checkpoint(unit) * self.units.rows
        crc: dict[NestedKey, int] = {}
        for a, b in self.units.pieces(unit, self.piece):
            crc = checksums(self.folder.read_rows(first + a, b - a, self.layout), crc)
        return named(crc)


def named(crc: Mapping[NestedKey, int]) -> dict[str, int]:
    """Checksums by key, as plain data."""
    return {name_of(key): value for key, value in crc.items()}


def stored_in(folder: JobFolder, reducers: Sequence[Reducer] = ()) -> Stored:
    """What the manifest of a folder says of what is in it.

    Args:
        folder: of the job.
        reducers: those of its reducers whose classes are not this library's.

    Raises:
        FileNotFoundError: there is no manifest.
        ValueError: it is no manifest of a job, or that of another version of tdhook.
    """
    told = folder.told()
    try:
        units, keep = _table(told["units"]), told["keep"]
        given = {one.name: one for one in reducers}
        described = [_table(one) for one in _list(told["reduce"])]
        return Stored(
            folder,
            Units(_int(units["rows"]), _int(units["chunk"]), _int(units["checkpoints"])),
            _int(units["piece"]),
            Layout.from_data(told["layout"]),
            keep is not None,
            keep is not None and bool(_table(keep)["compressed"]),
            tuple(_table(told["checkpoints"])),
            {str(one["name"]): given.get(str(one["name"])) or _reducer(one) for one in described},
            unravel_key(tuple(map(str, _list(told["attribution_key"])))),
        )
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{folder.manifest} does not say all of what is in the folder ({error}): it is of tdhook "
            f"{told.get('tdhook')}, with which it can be read"
        ) from error


def _table(value: Plain) -> dict[str, Plain]:
    if not isinstance(value, dict):
        raise TypeError(f"{value!r} is no table")
    return value


def _list(value: Plain) -> list[Plain]:
    if not isinstance(value, list):
        raise TypeError(f"{value!r} is no list")
    return value


def _int(value: Plain) -> int:
    if not isinstance(value, int) or not 0 <= value <= _LARGEST:
        raise TypeError(f"{value!r} is no number of rows")
    return value


def _reducer(told: Mapping[str, Plain]) -> Reducer:
    """A reducer that merges parts and says what they mean, as the one that made them does."""
    name, cls = str(told["name"]), _KNOWN.get(str(told["class"]))
    if cls is None:
        return _Unknown(name, str(told["class"]))
    made = cls.__new__(cls)
    for entry, value in told.items():
        if entry != "class":
            setattr(made, entry, _setting(value))
    return made


def _setting(value: Plain) -> object:
    if isinstance(value, list):  # a nested key
        return unravel_key(tuple(map(str, value)))
    return (
        _Described(str(value.get("function", value.get("class", "a function"))))
        if isinstance(value, dict)
        else value
    )


class _Described:
    """A function of which only the name is known."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, _: object) -> Tensor:
        raise RuntimeError(f"{self.name} is a function, of which the folder of the job knows the name alone")

    def __repr__(self) -> str:
        return self.name


class _Unknown(Reducer):
    """A reducer whose class is not this library's."""

    def __init__(self, name: str, cls: str) -> None:
        super().__init__(name=name)
        self._class = cls

    def part(self, piece: object) -> NoReturn:
        self._refuse()

    def merged(self, parts: object) -> NoReturn:
        self._refuse()

    def result(self, part: object) -> NoReturn:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise ValueError(
            f"the reducer {self.name!r} is a {self._class}, which is not of tdhook: give it, "
            f"open_result(folder, reducers=[...])"
        )


def require_same_source(stored: Stored, rows: Rows) -> None:
    """Make sure that rows are those that a job explained.

    Raises:
        ValueError: they are others; the message names what differs.
    """
    told = {name: one for name, one in _table(stored.folder.told()["source"]).items() if name != "chosen"}
    found = difference(json.loads(json.dumps(rows_identity(rows))), told)
    if found is not None:
        raise ValueError(
            f"the source is not that of {stored.folder.home}, and differs in {found}: give that one"
        )
