"""What a model reaches besides its tree: modules in containers, objects, functions and the classes of all these.

What is looked into is what can be seen from outside: attributes and entries, what a function closes over, has as
defaults and names as a global, and what the class of an object says of its methods. Objects and functions of libraries
(:data:`~tdhook.models.snapshots.LEFT_ALONE`) are not, but for containers, and for what their functions close over.
"""

from __future__ import annotations

from collections import UserDict, UserList, deque
from collections.abc import Iterable, Iterator
from dis import get_instructions
from functools import cache, partial
from types import CodeType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any
from weakref import ReferenceType

from torch import Tensor, nn

from tdhook.models.snapshots import is_of_a_library

__all__ = ["Reached"]

_CONTAINERS = (list, tuple, set, frozenset, dict, deque)
_PLAIN = (type(None), bool, int, float, complex, str, bytes)
_MOST = 10_000
_BOXES = (SimpleNamespace, UserDict, UserList)
_DESCRIPTORS = (staticmethod, classmethod, property)


class Reached:
    """Modules that are reached from some values, each object being looked into once."""

    def __init__(self) -> None:
        self._seen: dict[int, object] = {}  # which it holds, so that no other object takes the place of one

    def modules(self, name: str, value: object) -> Iterator[tuple[str, nn.Module]]:
        """The modules at a value or below, by dotted name."""
        if type(value) in _PLAIN or isinstance(value, Tensor):
            return
        if isinstance(value, nn.Module):
            yield name, value
            return
        if id(value) in self._seen or len(self._seen) > _MOST:
            return
        self._seen[id(value)] = value
        for key, below in self._below(value):
            yield from self.modules(f"{name}.{key}" if name else key, below)

    def of_class(self, kind: type, entry: str = "forward") -> Iterator[tuple[str, nn.Module]]:
        """The modules that are reached from a method of a class, by what it names there, other methods say."""
        ahead, seen = [entry], {entry}
        while ahead:
            name = ahead.pop()
            value = next(
                (vars(cls)[name] for cls in kind.__mro__ if name in vars(cls) and _is_own(cls)), None
            )
            yield from self.modules(name, value)
            code = getattr(_function_in(value), "__code__", None)
            further = _all_names(code) - seen if isinstance(code, CodeType) else set()
            ahead += sorted(further)
            seen |= further

    @staticmethod
    def _below(value: object) -> Iterable[tuple[str, object]]:
        if isinstance(value, _CONTAINERS):
            return _in_container(value)
        if isinstance(value, ReferenceType):
            return [("referent", value())]
        if isinstance(value, partial):
            return [("func", value.func), *_numbered(value.args), *value.keywords.items()]
        if isinstance(value, MethodType):
            return [("self", value.__self__), ("func", value.__func__)]
        if isinstance(value, FunctionType):
            return _in_function(value)
        if isinstance(value, _DESCRIPTORS):
            return [("func", _function_in(value))]
        wrapped = getattr(type(value), "__module__", "") == "functools" and getattr(
            value, "__wrapped__", None
        )
        if wrapped:
            return [("wrapped", wrapped)]
        if isinstance(value, type | ModuleType) or not (isinstance(value, _BOXES) or _is_own(type(value))):
            return ()
        return [*_in_object(value), *_in_class(type(value))]


def _in_container(value: Any) -> list[tuple[str, object]]:
    """What the built-in container holds, whatever a class that derives from it makes of its methods."""
    kind: Any = next(kind for kind in _CONTAINERS if isinstance(value, kind))
    if kind.__len__(value) > _MOST:
        return []
    entries = kind.items(value) if kind is dict else enumerate(kind.__iter__(value))
    return [(str(key), below) for key, below in list(entries)]


def _is_own(value: type | FunctionType | ModuleType) -> bool:
    """Whether a class, function or file is the user's."""
    home = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
    return isinstance(home, str) and not is_of_a_library(home)


def _function_in(value: object) -> object:
    """The function that a method of a class is made of."""
    if isinstance(value, property):
        return value.fget
    return getattr(value, "__func__", value)


def _in_object(value: object) -> Iterator[tuple[str, object]]:
    inside = getattr(value, "__dict__", None)
    if isinstance(inside, dict):
        yield from list(inside.items())
    for kind in type(value).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            descriptor = kind.__dict__.get(name)
            if descriptor is not None and name not in ("__dict__", "__weakref__"):
                try:
                    yield name, descriptor.__get__(value, kind)
                except AttributeError:  # nothing was put there yet
                    continue


def _in_class(kind: type) -> Iterator[tuple[str, object]]:
    for cls in kind.__mro__:
        if _is_own(cls):
            yield from [
                (name, value) for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")
            ]


def _in_function(function: FunctionType) -> Iterator[tuple[str, object]]:
    """What a function closes over and has as defaults; and what it names, if it is the user's."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # nothing was assigned yet
            continue
    yield from _numbered(function.__defaults__ or ())
    yield from (function.__kwdefaults__ or {}).items()
    if not _is_own(function):
        return
    known = function.__globals__
    names = _names_of(function.__code__)
    for name in names:
        value = known.get(name)
        if isinstance(value, ModuleType):
            if _is_own(value):  # what is taken from there
                taken = sorted(_all_names(function.__code__) & vars(value).keys())
                yield from ((f"{name}.{key}", vars(value)[key]) for key in taken)
        elif value is not None and not isinstance(value, type):
            yield name, value


@cache
def _names_of(code: CodeType) -> tuple[str, ...]:
    """The globals that code reads, and the code inside it."""
    own = [step.argval for step in get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")]
    inside = [
        name for constant in code.co_consts if isinstance(constant, CodeType) for name in _names_of(constant)
    ]
    return tuple(dict.fromkeys([*own, *inside]))


@cache
def _all_names(code: CodeType) -> frozenset[str]:
    """The names of globals and of attributes in code, and in the code inside it."""
    inside = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return frozenset((*code.co_names, *(name for each in inside for name in _all_names(each))))


def _numbered(values: Iterable[object]) -> Iterator[tuple[str, object]]:
    """Values by their number, in words."""
    return ((str(i), value) for i, value in enumerate(values))
