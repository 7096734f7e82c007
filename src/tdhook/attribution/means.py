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
    """The mean of what is added, by key, and with ``spread`` its standard deviation (Chan, Golub and LeVeque 1983).

    Attributes:
        mean: by key; of one addition, that itself.
        count: how many were added.
    """

    def __init__(self, spread: bool = False) -> None:
        self.mean: dict[NestedKey, Tensor] = {}
        self.count = 0
        self._squares: dict[NestedKey, Tensor] = {}
        self._spread = spread

    def add(self, found: Mapping[K, Tensor]) -> None:
        """Add one of each."""
        if self.count:
            self.add_all({key: value.unsqueeze(0) for key, value in found.items()}, 1)
        else:
            self.count = 1
            self.mean.update(found)

    def add_all(self, found: Mapping[K, Tensor], count: int) -> None:
        """Add several of each, along the first axis.

        Args:
            found: ``[count, ...]`` by key.
            count: how many.
        """
        before, self.count = self.count, self.count + count
        for key, values in found.items():
            mean = values.mean(0) if count > 1 else values[0]
            away = mean - self.mean[key] if before else mean
            if self._spread:
                square = (values - mean).square().sum(0)
                if before:
                    square = square + away.square() * (before * count / self.count)
                self._squares[key] = self._squares[key] + square if key in self._squares else square
            self.mean[key] = self.mean[key] + away * (count / self.count) if before else mean

    def deviations(self) -> dict[NestedKey, Tensor]:
        """The standard deviation of each, of at least two."""
        return {key: torch.sqrt(square / (self.count - 1)) for key, square in self._squares.items()}
