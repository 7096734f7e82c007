"""Containers, arrays and functions: what they hold, to be put back later."""

from __future__ import annotations

from collections import deque
from operator import is_not
from types import CellType, FunctionType
from typing import Any

from tdhook.models.generators import By, Held

__all__ = ["of_array", "of_bytes", "of_function", "of_sequence", "of_set"]


def of_sequence(held: list[object] | deque[object]) -> Held:
    """The elements of a list or a deque."""
    before = list(held)

    def restore() -> None:
        held.clear()
        held.extend(before)

    return By(lambda: len(held) != len(before) or any(map(is_not, held, before)), restore)


def of_set(held: set[object]) -> Held:
    """The elements of a set."""
    before = set(held)

    def restore() -> None:
        held.clear()
        held.update(before)

    return By(lambda: held != before, restore)


def of_bytes(value: Any) -> Held:
    """The numbers of a ``bytearray`` or an ``array``."""
    before = value[:]
    return By(lambda: bool(value != before), lambda: value.__setitem__(slice(None), before))


def of_array(value: Any) -> tuple[Held, list[object]]:
    """The values of an array of numpy, and those among them that are objects."""
    before = value.copy()

    def restore() -> None:
        value[...] = before

    if value.dtype == object:
        inside = list(before.flat)
        return By(lambda: any(map(is_not, value.flat, inside)), restore), inside
    return By(lambda: bool((value != before).any()), restore), []


_EMPTY = object()


def of_function(value: FunctionType) -> tuple[Held | None, list[object]]:
    """What a function closes over, and that with its defaults and attributes."""
    cells = value.__closure__ or ()
    before = [*map(_in_cell, cells)]

    def restore() -> None:
        for cell, old in zip(cells, before, strict=True):
            if old is not _EMPTY:
                cell.cell_contents = old
            elif _in_cell(cell) is not _EMPTY:
                del cell.cell_contents

    held = By(lambda: any(map(is_not, map(_in_cell, cells), before)), restore) if cells else None
    return held, [*before, *(value.__defaults__ or ()), value.__kwdefaults__, value.__dict__]


def _in_cell(cell: CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # nothing was assigned yet
        return _EMPTY
