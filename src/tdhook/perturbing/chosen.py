"""Rows that a reference is made of, chosen by arithmetic alone."""

from __future__ import annotations

import random

import torch
from torch import Tensor

__all__ = ["Chosen"]

_PRIME = 2**31 - 1


class Chosen:
    """The rows that one reference is made of, the same for all keys.

    They follow from the seed by arithmetic alone (Carter and Wegman 1979), so that a compiled graph draws the same in
    each of its calls.

    Args:
        seed: of all references.
        number: which of these it is.
    """

    def __init__(self, seed: int, number: int) -> None:
        chance = random.Random(f"{seed} {number}")
        self._factors = [chance.randrange(1, _PRIME) for _ in range(3)]

    def __call__(self, among: int, count: int, device: torch.device | None, first: int = 0) -> Tensor:
        """``count`` numbers of rows among so many, ``[count]``, of the elements from the ``first`` on."""
        begin = first % _PRIME
        at = torch.arange(begin, begin + count, device=device)
        square, linear, start = self._factors
        return ((square * at + linear) % _PRIME * at + start) % _PRIME % among
