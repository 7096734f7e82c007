"""Picking: whether rows of values on the tape are put in another order, or chosen, as by sorting and by routing."""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum

import torch
from torch import Tensor
from torch.autograd.graph import Node

from tdhook.tape.functions import nodes_behind
from tdhook.tape.internals import argument_kept_by

__all__ = ["Rows", "rows_of"]


class Rows(IntEnum):
    """What becomes of rows."""

    KEPT = 0
    """Nothing gives them other places."""
    MOVED = 1
    """Something may, the same in each call, as ``flip`` does."""
    PICKED = 2
    """Something may that depends on values, as an index does."""


_BY_INDICES = ("Index", "IndexPut")
_BY_INDEX = ("IndexSelect", "Gather", "Sort", "Topk", "IndexAdd", "IndexCopy", "Scatter", "ScatterAdd")
_ANYWHERE = ("MaskedSelect", "MaskedScatter", "Take", "ScatterReduce")
_MOVING = ("Flip", "Roll", "Cat", "Stack")


def rows_of(values: Iterable[Tensor], count: int) -> Rows:
    """What becomes of rows on the way to some values: along the first axis, or another one of so many.

    Args:
        values: on the tape.
        count: how many elements the batch has.
    """
    found = Rows.KEPT
    for node in nodes_behind(x.grad_fn for x in values):
        found = max(found, _done_by(node, count))
        if found is Rows.PICKED:
            break
    return found


def _done_by(node: Node, count: int) -> Rows:
    kind = node.name().partition("Backward")[0]
    if kind in _ANYWHERE:
        return Rows.PICKED
    if kind in _BY_INDICES:
        indices = argument_kept_by(node, "indices")
        axes = [axis for axis, index in enumerate(indices) if index is not None]
        if _is_own_place(indices):
            axes = axes[1:]
    elif kind in _BY_INDEX or kind in ("Cat", "Stack"):
        axes = [argument_kept_by(node, "dim")]
    elif kind in _MOVING:
        axes = list(argument_kept_by(node, "dims"))
    else:
        return Rows.KEPT
    sizes = argument_kept_by(node, "self_sym_sizes") or ()
    if not any(axis == 0 or (axis < len(sizes) and sizes[axis] == count) for axis in axes):
        return Rows.KEPT
    return Rows.MOVED if kind in _MOVING else Rows.PICKED


def _is_own_place(indices: Iterable[Tensor | None]) -> bool:
    """Whether each row is that of its own place, of which something is picked: ``x[arange(n), index]``."""
    first, *others = indices
    if first is None or first.dtype is torch.bool or not any(index is not None for index in others):
        return False
    flat = first.reshape(-1)
    return bool((flat == torch.arange(len(flat), device=flat.device)).all())
