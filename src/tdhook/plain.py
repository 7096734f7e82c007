"""Plain data, as TOML and JSON give it: checked before anything is made of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

__all__ = ["DEEPEST", "require_plain"]

DEEPEST = 64
"""How deeply tables and lists may be nested."""


def require_plain(data: object) -> None:
    """Make sure that data is not nested too deeply, and has no NaN in it.

    Raises:
        ValueError: it is, or has. The message names the place: ``pairs[0].epsilon``.
    """
    waiting: list[tuple[object, str, int]] = [(data, "", 0)]
    while waiting:
        value, place, depth = waiting.pop()
        if isinstance(value, float) and math.isnan(value):
            raise ValueError(f"{place or 'it'} is nan, which is no number to compute with")
        inside: Iterable[tuple[str, object]] = ()
        if isinstance(value, Mapping):
            inside = ((f"{place}.{key}" if place else str(key), entry) for key, entry in value.items())
        elif isinstance(value, list | tuple):
            inside = ((f"{place}[{i}]", entry) for i, entry in enumerate(value))
        else:
            continue
        if depth > DEEPEST:
            raise ValueError(f"{place} is nested more than {DEEPEST} deep")
        waiting += [(entry, name, depth + 1) for name, entry in inside]
