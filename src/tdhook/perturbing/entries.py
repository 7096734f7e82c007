"""Entries of a batch that hold references: those that parts of it are compared with."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from tensordict import TensorDictBase
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor

from tdhook.keys import GIVEN, parts_of, put

__all__ = ["entries_of_references", "fill"]


def entries_of_references(td: TensorDictBase, keys: Collection[NestedKey]) -> dict[NestedKey, NestedKey]:
    """The entries of a TensorDict that hold references to some keys, by their own, with the key that each is one to."""
    below = td.get(GIVEN, None)
    found: dict[NestedKey, NestedKey] = {}
    for name, value in () if below is None else below.items(True, True):
        parts = parts_of(name)
        for own in (parts, parts[1:]):  # those that are drawn have a number before
            key = unravel_key(own) if own else ""
            if value.is_floating_point() and key in keys:
                found[unravel_key((GIVEN, *parts))] = key
                break
    return found


def fill(drawn: Mapping[NestedKey, Tensor], numbers: range, part: TensorDictBase) -> TensorDictBase:
    """Add the references that were drawn to a part of a batch."""
    part = part.copy() if drawn else part
    for key, source in drawn.items():
        for number in numbers:
            index = part.get((GIVEN, f"{number}", f"of {len(source)}"))
            put(
                part,
                (GIVEN, f"{number}", *parts_of(key)),
                source[index.to(source.device)].to(part.get(key).device),
                key,
            )
    return part
