"""Top lists: of many units at once the steps with the largest amounts, the same however steps are cut into parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor

from tdhook.keys import parts_of

__all__ = ["best", "both", "note_key", "note_name"]

_NOTE = "note"
_BETWEEN = ":"
"""Between the parts of a key: a dot would be one between keys of TensorDicts, and a slash between files."""
_SIGNS = (1.0, -1.0)
"""Of the sides: the largest amounts, and the most negative ones."""


def note_name(key: NestedKey) -> str:
    """What a note is called among lists."""
    return _BETWEEN.join((_NOTE, *parts_of(key)))


def note_key(name: str) -> NestedKey | None:
    """The key of a note by its name; ``None`` where the list is none of notes."""
    first, *parts = name.split(_BETWEEN)
    return unravel_key(tuple(parts)) if parts and first == _NOTE else None


def best(
    amount: Tensor,
    position: Tensor,
    of_steps: Mapping[str, Tensor],
    group: Tensor,
    groups: int,
    count: int,
) -> dict[str, Tensor]:
    """The steps with the largest amounts of each unit, in each group.

    Args:
        amount: ``[sides, steps, units]``, steps in their order.
        position: ``[sides, steps, units]``.
        of_steps: what else is listed of a step, ``[steps]`` by name, ``row`` and ``step`` among it.
        group: the group of each step, ``[steps]``.
        groups: how many there are.
        count: how many steps are listed at most.

    Returns:
        ``amount``, ``position`` and what is listed, ``[groups, sides, units, found]``, the largest first, of equal ones
        the first. Where there are fewer, ``row`` is ``-1``.
    """
    sides, units = len(position), amount.shape[-1]
    width = min(count, int(torch.bincount(group).max())) if len(group) else 0
    found = _empty((groups, sides, units, width), of_steps)
    columns = torch.arange(units)[:, None]
    for g in range(groups):
        here = (group == g).nonzero()[:, 0]
        for side, sign in enumerate(_SIGNS[:sides]):
            signed = (amount[side, here] * sign).T.contiguous()
            first = here[torch.sort(signed, dim=-1, descending=True, stable=True).indices[:, :width]]
            at = (g, side, slice(None), slice(first.shape[1]))
            found["amount"][at] = amount[side][first, columns]
            found["position"][at] = position[side][first, columns]
            for name, value in of_steps.items():
                found[name][at] = value[first]
    return found


def _empty(shape: tuple[int, ...], of_steps: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Lists of no steps, ``[groups, sides, units, found]``."""
    found = {name: torch.zeros(shape, dtype=value.dtype) for name, value in of_steps.items()}
    found["row"] -= 1
    found["position"] = torch.zeros(shape, dtype=torch.int64)
    found["amount"] = torch.zeros(shape, dtype=torch.float64)
    for side in range(shape[1]):
        found["amount"][:, side] = -torch.inf * _SIGNS[side]
    return found


def both(
    one: Mapping[str, Tensor],
    other: Mapping[str, Tensor],
    places: Sequence[Tensor],
    groups: int,
    count: int,
) -> dict[str, Tensor]:
    """The lists of two parts, made one.

    Args:
        one: the lists of :func:`best` by name, and perhaps more.
        other: those of other steps.
        places: where the groups of each are among all of them.
        groups: how many there are.
        count: how many steps are listed at most.

    Raises:
        ValueError: a step is in both.
    """
    names = [
        name for name in one if name in ("amount", "row", "step", "position") or note_key(name) is not None
    ]
    sides, units = one["row"].shape[1:3]
    sign = torch.tensor(_SIGNS[:sides], dtype=torch.float64)[:, None, None]
    lists = []
    for part, place in zip((one, other), places, strict=True):
        listed = {name: part[name] for name in names}
        if len(place) < groups:
            shape = (groups, sides, units, part["row"].shape[-1])
            wide = _empty(shape, {name: part[name] for name in names if name not in ("amount", "position")})
            for name, value in listed.items():
                wide[name][place] = value
            listed = wide
        lists.append({**listed, "key": listed["amount"] * sign})
    first, second = lists
    width = first["row"].shape[-1]
    if width == count and second["row"].shape[-1]:
        # Most lists stay as they are, once many steps have been seen.
        last, new = first["key"][..., -1], second["key"][..., 0]
        changes = (new > last) | ((new == last) & (second["row"][..., 0] <= first["row"][..., -1]))
        found = {name: first[name].clone() for name in names}
        few = _joined([{name: x[changes] for name, x in part.items()} for part in lists], count)
        for name in names:
            found[name][changes] = few[name]
        return found
    joined = _joined([{name: x.flatten(0, 2) for name, x in part.items()} for part in lists], count)
    # As wide as the longest list is, of however many parts it was made.
    width = int((joined["row"] >= 0).sum(-1).max()) if joined["row"].numel() else 0
    return {name: joined[name][:, :width].reshape(groups, sides, units, width) for name in names}


def _joined(parts: Sequence[Mapping[str, Tensor]], count: int) -> dict[str, Tensor]:
    """Lists ``[lists, entries]`` of several parts, ordered by amount, then by row and step."""
    whole = {name: torch.cat([part[name] for part in parts], -1) for name in parts[0]}
    order = torch.argsort(whole["step"], dim=-1, stable=True)
    for name, down in (("row", False), ("key", True)):
        by = whole[name].gather(-1, order)
        order = order.gather(-1, torch.argsort(by, dim=-1, stable=True, descending=down))
    found = {name: value.gather(-1, order) for name, value in whole.items()}
    twice = (found["row"][:, 1:] >= 0) & (found["key"].diff(dim=-1) == 0)
    for name in ("row", "step"):
        twice &= found[name].diff(dim=-1) == 0
    if bool(twice.any()):
        raise ValueError(f"row {int(found['row'][:, 1:][twice][0])} is in both parts: a row is counted once")
    return {name: value[:, :count] for name, value in found.items()}
