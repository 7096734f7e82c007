"""Reaching: what code holds besides its module, to be put back later.

A function remembers in the variables that it closes over, in its defaults and attributes, and in the variables of its
file; a class in its own attributes, which all its objects share. Looked into is the code of users, as far as a call of
a module can come to it: from ``forward`` on, the functions that are named there.
"""

from __future__ import annotations

import dis
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache, partial
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any, NamedTuple

from torch import nn

from tdhook.models.generators import By, Held

__all__ = ["is_code", "of_class", "of_code"]

_FIRST = ("forward", "__call__")
_ABSENT = object()


class _Names(NamedTuple):
    """The names in a piece of code: of variables of its file that are read and that are set, and of attributes."""

    read: frozenset[str]
    set: frozenset[str]
    attributes: frozenset[str]


def is_code(value: object) -> bool:
    """Whether a value is a function, or one with some of its arguments."""
    return isinstance(value, FunctionType | MethodType | partial)


def of_code(value: Any, is_users: Callable[[str], bool]) -> tuple[Held | None, list[object]]:
    """How to put back what a function closes over and sets in its file, and the values that it leads to.

    Args:
        value: the function.
        is_users: whether a module of Python, by its name, has code of users.
    """
    if isinstance(value, partial):
        return None, [value.func, value.args, value.keywords]
    if isinstance(value, MethodType):
        return None, [value.__self__, value.__func__]
    inside: object = vars(value).get("__wrapped__")
    if not is_users(str(value.__globals__.get("__name__"))):
        return None, [] if inside is None else [inside]
    cells, known, names = value.__closure__ or (), value.__globals__, _names(value.__code__)
    before = [_content(cell) for cell in cells]
    variables = {name: known.get(name, _ABSENT) for name in names.set}

    def changed() -> bool:
        return any(_content(cell) is not old for cell, old in zip(cells, before, strict=True)) or any(
            known.get(name, _ABSENT) is not old for name, old in variables.items()
        )

    def restore() -> None:
        for cell, old in zip(cells, before, strict=True):
            if old is not _ABSENT:
                cell.cell_contents = old
            elif _content(cell) is not _ABSENT:
                del cell.cell_contents
        for name, old in variables.items():
            if old is not _ABSENT:
                known[name] = old
            else:
                known.pop(name, None)

    below = [*before, *(known[name] for name in names.read if name in known), vars(value)]
    below += [value.__defaults__, value.__kwdefaults__]
    held = By(changed, restore) if cells or variables else None
    return held, [one for one in below if one is not _ABSENT and one is not None]


def of_class(value: object, is_users: Callable[[str], bool]) -> Iterator[tuple[type, Held, list[object]]]:
    """The classes of an object that are users', how to put back their attributes, and the values these lead to.

    Args:
        value: the object; of a module, only functions that its call can come to are looked into.
        is_users: whether a module of Python, by its name, has code of users.
    """
    theirs = [kind for kind in type(value).__mro__ if is_users(kind.__module__)]
    reached = _reached(theirs) if isinstance(value, nn.Module) else None
    for kind in theirs:
        inside = list(vars(kind).items())
        functions = [one for name, one in inside if reached is None or name in reached]
        held, values = _attributes(kind)
        yield kind, held, [*values, *filter(is_code, map(_unbound, functions))]


def _reached(kinds: Iterable[type]) -> set[str]:
    """The names of functions of a class that its call can come to."""
    kinds, ahead, seen = list(kinds), list(_FIRST), set[str]()
    while ahead:
        name = ahead.pop()
        if name in seen:
            continue
        seen.add(name)
        for kind in kinds:
            function = _unbound(vars(kind).get(name))
            if isinstance(function, FunctionType):
                ahead += _names(function.__code__).attributes
    return seen


def _attributes(kind: type) -> tuple[Held, list[object]]:
    """The attributes of a class that are data."""

    def data() -> dict[str, object]:
        return {
            name: one
            for name, one in list(vars(kind).items())
            if name[:2] != "__" and name[:5] != "_abc_" and not _is_part(one)
        }

    before = data()

    def changed() -> bool:
        now = data()
        return now.keys() != before.keys() or any(now[name] is not old for name, old in before.items())

    def restore() -> None:
        for name in data().keys() - before.keys():
            delattr(kind, name)
        for name, old in before.items():
            if vars(kind).get(name, _ABSENT) is not old:
                setattr(kind, name, old)

    return By(changed, restore), list(before.values())


def _is_part(value: object) -> bool:
    """Whether an attribute of a class is a function, or what gives objects an attribute of that name."""
    return callable(value) or hasattr(type(value), "__get__")


def _unbound(value: object) -> object:
    """The function behind an attribute of a class."""
    if isinstance(value, staticmethod | classmethod):
        return value.__func__
    return value.fget if isinstance(value, property) else value


def _content(cell: CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # nothing was assigned yet
        return _ABSENT


@lru_cache(maxsize=4096)
def _names(code: CodeType) -> _Names:
    read, set_, attributes = set[str](), set[str](), set[str]()
    for one in dis.get_instructions(code):
        if one.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            read.add(one.argval)
        elif one.opname in ("STORE_GLOBAL", "DELETE_GLOBAL"):
            set_.add(one.argval)
        elif one.opname in ("LOAD_ATTR", "LOAD_METHOD", "STORE_ATTR"):
            attributes.add(one.argval)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            inner = _names(constant)
            read |= inner.read
            set_ |= inner.set
            attributes |= inner.attributes
    return _Names(frozenset(read), frozenset(set_), frozenset(attributes))
