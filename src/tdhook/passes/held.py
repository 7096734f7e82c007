"""Tensors that an attribution method holds: baselines, the data they are taken of, indices, bounds of rules."""

from __future__ import annotations

from tensordict import TensorDictBase
from torch import Tensor, nn

from tdhook.models.state import Slot

__all__ = ["held_by"]


def held_by(thing: object) -> tuple[Slot, ...]:
    """Where an object of the library keeps tensors, itself or in what it holds, so that they can be replaced.

    A graph takes them as arguments: one that it held itself would stay what it was when the graph was made.
    """
    found: list[Slot] = []
    seen: set[int] = set()
    ahead = [thing]
    while ahead:
        one = ahead.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, list | tuple):
            ahead += one
            continue
        entries = _entries(one)
        found += [(entries, name) for name, value in entries.items() if isinstance(value, Tensor)]
        ahead += [value for value in entries.values() if not isinstance(value, Tensor)]
    return tuple(found)


def _entries(one: object) -> dict[str, object]:
    if isinstance(one, dict):
        return one
    if isinstance(one, TensorDictBase):
        entries = getattr(one, "_tensordict", None)  # which those that are stacked lazily have not
        return entries if isinstance(entries, dict) else {}
    ours = any(kind.__module__.partition(".")[0] == "tdhook" for kind in type(one).__mro__)
    return vars(one) if ours and hasattr(one, "__dict__") and not isinstance(one, nn.Module) else {}
