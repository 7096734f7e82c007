"""Whether a tensor is still what it was, though nobody says that it was written to."""

from __future__ import annotations

import torch
from torch import Tensor

from tdhook.tape.internals import version_of

__all__ = ["Unchanged"]


class Unchanged:
    """A tensor as it is now, to compare with later.

    It is told by its memory, its version, and a sample of its values, since neither writes through ``.data`` nor those
    of another process raise the version.

    Args:
        x: the tensor. Its memory is held, lest other values come to lie at the same address.
        sampled: how many of its values are looked at, at most.
    """

    def __init__(self, x: Tensor, sampled: int) -> None:
        self._held, self._sampled = x.detach(), sampled
        self._state = _state(x)
        self._sample = self._sampled_of(x).clone()

    def is_of(self, x: Tensor) -> bool:
        """Whether a tensor is that one, and nothing changed since."""
        return _state(x) == self._state and torch.equal(self._sampled_of(x), self._sample)

    def _sampled_of(self, x: Tensor) -> Tensor:
        values = x.detach().flatten()
        return values[:: max(1, -(-len(values) // self._sampled))]


def _state(x: Tensor) -> tuple[object, ...]:
    return version_of(x), x.data_ptr(), x.dtype, x.shape, x.stride()
