"""Selectors from plain data."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from tensordict.utils import NestedKey, unravel_key

from tdhook.selectors.base import AllOf, AnyOf, NotThe, Selector
from tdhook.selectors.modules import First, Last, Name, Reads, Type, Writes, class_named
from tdhook.selectors.operations import Op

__all__ = ["read"]


def _read_type(value: Any) -> Selector:
    names = [value] if isinstance(value, str) else list(value)
    if not all(isinstance(name, str) for name in names):
        raise TypeError("classes are given by name")
    return Type(*(class_named(name) for name in names))


def _read_key(value: Any) -> NestedKey:
    parts = (value,) if isinstance(value, str) else tuple(value)
    if not parts or not all(isinstance(part, str) for part in parts):
        raise TypeError(f"{value!r} is no key; a key is a string or a list of strings")
    return unravel_key(parts)


def _read_name(value: Any) -> Selector:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no glob")
    return Name(value)


def _read_regex(value: Any) -> Selector:
    given = value if isinstance(value, Mapping) else {"pattern": value}
    return Name(re.compile(given["pattern"], given.get("flags", 0)))


def _read_several(value: Any) -> tuple[Selector, ...]:
    if not isinstance(value, list | tuple) or not value:
        raise TypeError(f"expected a list of selectors, got {value!r}")
    return tuple(map(Selector.from_dict, value))


_READERS: dict[str, Callable[[Any], Selector]] = {
    "type": _read_type,
    "name": _read_name,
    "regex": _read_regex,
    "op": lambda value: Op(*([value] if isinstance(value, str) else value)),
    "reads": lambda value: Reads(_read_key(value)),
    "writes": lambda value: Writes(_read_key(value)),
    "first": lambda value: First(Selector.from_dict(value)),
    "last": lambda value: Last(Selector.from_dict(value)),
    "all": lambda value: AllOf(_read_several(value)),
    "any": lambda value: AnyOf(_read_several(value)),
    "not": lambda value: NotThe(Selector.from_dict(value)),
}


def read(data: Any) -> Selector:
    """Make a selector from plain data: what ``to_dict`` gave; a string is a glob on the path.

    Raises:
        ValueError: the data is not that of a selector.
    """
    if isinstance(data, str):
        return Name(data)
    kinds: list[Any] = list(data) if isinstance(data, Mapping) else []
    if len(kinds) != 1 or kinds[0] not in _READERS:
        raise ValueError(f"not a selector: {data!r}; expected one entry out of {', '.join(_READERS)}")
    try:
        return _READERS[kinds[0]](data[kinds[0]])
    except (KeyError, TypeError, re.error) as error:
        raise ValueError(f"not a selector: {data!r}: {error}") from error
