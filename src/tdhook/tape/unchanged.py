"""Whether a tensor is still what it was, though nobody says that it was written to."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tdhook.tape.internals import components_of, is_plain, version_of

__all__ = ["Unchanged"]

_WHOLE = 1 << 12


class Unchanged:
    """A tensor as it is now, to compare with later.

    It is told by its memory, its version, and its values, since neither writes through ``.data`` nor those of another
    process raise the version: by all of them where they are few, else by their sums along the first axis and along the
    others, in single precision at least. So a row, a column or a single value that was written to is seen, unless it
    is no more than the rounding of these sums.

    Args:
        x: the tensor. Its memory is held, lest other values come to lie at the same address.
    """

    def __init__(self, x: Tensor) -> None:
        self._held = x.detach()
        self._state = _state(x)
        self._values = [values.clone() for values in _values(x)]

    def is_of(self, x: Tensor) -> bool:
        """Whether a tensor is that one, and nothing changed since."""
        return _state(x) == self._state and all(map(torch.equal, _values(x), self._values))


def _values(x: Tensor) -> list[Tensor]:
    """What tells the values of a tensor."""
    x = x.detach()
    if not is_plain(x):
        return [values for part in components_of(x) for values in _values(part)]
    if x.numel() <= _WHOLE or x.is_complex():
        return [x]
    dtype = torch.promote_types(x.dtype, torch.float32) if x.is_floating_point() else torch.int64
    width = x[0].numel() if x.dim() > 1 else math.isqrt(len(x))
    line = x.reshape(-1)
    rows = line[: len(line) // width * width].reshape(-1, width)
    return [rows.sum(0, dtype=dtype), rows.sum(1, dtype=dtype), line[rows.numel() :]]


def _state(x: Tensor) -> tuple[object, ...]:
    if not is_plain(x):
        return version_of(x), x.layout, *map(_state, components_of(x))
    return version_of(x), x.data_ptr(), x.dtype, x.shape, x.stride()
