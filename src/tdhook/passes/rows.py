"""Rows: a batch of any shape as a line of them, so many at once, put together again."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook.conventions import relevance_of
from tdhook.targets.base import Seeds

__all__ = [
    "is_close",
    "joined",
    "parting",
    "rows_of",
    "shaped_like",
    "some_rows",
    "values_of",
    "with_rows",
]


def rows_of(td: TensorDictBase, axes: int) -> TensorDictBase:
    """``td`` with its first ``axes`` batch axes made one: ``[rows, *rest]``, a row for each thing to explain."""
    return td.reshape(-1, *td.batch_size[axes:]) if axes else td.unsqueeze(0)


def shaped_like(values: Tensor, td: TensorDictBase, axes: int) -> Tensor:
    """``values [rows, *rest]`` of :func:`rows_of` as ``[*batch, *rest]``."""
    return values.reshape((*td.batch_size[:axes], *values.shape[1:]))


def joined(
    rows: TensorDictBase, at_once: int, found: Callable[[TensorDictBase], Mapping[NestedKey, Tensor]]
) -> dict[NestedKey, Tensor]:
    """What is found of rows, so many at once, in one line.

    Args:
        rows: ``[rows, *rest]``.
        at_once: how many rows are looked at together, at least.
        found: given some rows, what there is of them by key, ``[some, ...]``.

    Returns:
        By key, ``[rows, ...]``.
    """
    each = [found(part) for part in rows.split(max(1, at_once))]
    return {key: torch.cat([part[key] for part in each]) for key in each[0]}


def is_close(a: Tensor, b: Tensor) -> Tensor:
    """Whether values are equal but for rounding, which goes by the largest of them: a truth value, or several."""
    if not a.numel():
        return torch.ones((), dtype=torch.bool, device=a.device)
    reach: float = torch.finfo(a.dtype).eps ** 0.5
    return torch.le((a - b).abs(), reach * b.abs().amax()).all()


def parting(count: int, device: torch.device | None = None) -> list[Tensor]:
    """Sets of so many places, ``[places]`` truth values: for each two places one that has the one and not the other."""
    place = torch.arange(count, device=device)
    return [(place >> bit) % 2 == side for bit in range((count - 1).bit_length()) for side in (1, 0)]


def some_rows(x: Tensor, count: int, rows: Tensor, after: int = 0) -> Tensor:
    """Some elements along the first batch axis of a value, which may have all batch axes in one.

    Args:
        x: ``[count, ...]`` or ``[count * others, ...]``, after ``after`` more axes.
        count: how many elements there are along the first batch axis.
        rows: which of them, ``[rows]``.
        after: how many axes come before.
    """
    apart = x.reshape(*x.shape[:after], count, -1, *x.shape[after + 1 :])
    return apart.index_select(after, rows).flatten(after, after + 1)


def with_rows(x: Tensor, count: int, rows: Tensor, values: Tensor, after: int = 0) -> Tensor:
    """A value with others in the place of what :func:`some_rows` gives."""
    apart = x.reshape(*x.shape[:after], count, -1, *x.shape[after + 1 :])
    new = values.reshape(*x.shape[:after], len(rows), *apart.shape[after + 1 :])
    return apart.index_copy(after, rows, new).reshape(x.shape)


def values_of(seeds: Seeds, batch: torch.Size) -> Tensor:
    """What is explained of each element, weights times outputs, ``[*batch]``; or ``[outputs, *batch]``."""
    lead = () if seeds.several is None else (seeds.several,)
    found = None
    for z, weight in zip(seeds.tensors, seeds.grads, strict=True):
        share = relevance_of(z, weight, "gradient")
        # A layer that is explained may have the axes of the batch as one; or values of no element that could be told.
        if z.numel() % batch.numel():
            share = share.reshape(*lead, *(1,) * len(batch), -1).expand(*lead, *batch, -1) / batch.numel()
        share = share.reshape(*lead, *batch, -1).sum(-1)
        found = share if found is None else found + share
    assert found is not None
    return found
