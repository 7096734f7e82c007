"""Whether what two runs of a model met is the same."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tdhook.tape.internals import is_plain, storage_of
from tdhook.tape.sparse import equal

__all__ = ["SMALL", "fits", "is_alike", "is_same"]

SMALL = 1 << 14
"""The most elements of a constant whose values are looked at."""


def fits(shape: Sequence[int], other: Sequence[int]) -> bool:
    """Whether a value of one row stands for one of several."""
    if shape == other or len(shape) != len(other):
        return shape == other
    differing = [m for n, m in zip(shape, other, strict=True) if n != m]
    return differing == [1]


def is_alike(x: Tensor, other: Tensor) -> bool:
    """Whether a constant is the same as in an earlier run, as far as that is seen here."""
    return is_same(x, other) or (x.numel() <= SMALL and x.shape == other.shape and equal(x, other))


def is_same(x: Tensor, start: Tensor) -> bool:
    """Whether a tensor is the very same in both runs: a weight, say."""
    if start.requires_grad or x.dtype != start.dtype:
        return False
    if not is_plain(x):
        return equal(x, start)
    if x.shape != start.shape:
        return False
    return storage_of(x) == storage_of(start) and x.storage_offset() == start.storage_offset()
