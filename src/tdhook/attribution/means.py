"""Means over several explanations, and how far they spread."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from tensordict.utils import NestedKey
from torch import Tensor

__all__ = ["Means"]

K = TypeVar("K", bound=NestedKey)


class Means:
    """The mean of what is added, by key, and with ``spread`` its standard deviation (Welford 1962).

    Attributes:
        mean: by key; of one addition, that itself.
    """

    def __init__(self, spread: bool = False) -> None:
        self.mean: dict[NestedKey, Tensor] = {}
        self._squares: dict[NestedKey, Tensor] = {}
        self._spread, self._count = spread, 0

    def add(self, found: Mapping[K, Tensor]) -> None:
        """Add one of each."""
        self._count += 1
        if self._count == 1:
            self.mean.update(found)
            return
        for key, value in found.items():
            before = self.mean[key]
            away = value - before
            self.mean[key] = before + away / self._count
            if self._spread:
                square = away * (value - self.mean[key])
                self._squares[key] = self._squares[key] + square if key in self._squares else square

    def deviations(self) -> dict[NestedKey, Tensor]:
        """The standard deviation of each, of at least two."""
        return {key: torch.sqrt(square / (self._count - 1)) for key, square in self._squares.items()}
