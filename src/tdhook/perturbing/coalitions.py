"""Coalitions: which features are there, and with what weight."""

from __future__ import annotations

import math
import random

import torch
from torch import Tensor

__all__ = ["Orders", "all_coalitions", "shapley_weights"]


def all_coalitions(count: int, numbers: range | None = None) -> Tensor:
    """Every set of so many features, the number of which has a bit for each: truth values ``[2 ** count, count]``.

    Args:
        count: how many features.
        numbers: which sets; by default all, from that of none to that of all.
    """
    chosen = range(2**count) if numbers is None else numbers
    bits = torch.arange(chosen.start, chosen.stop).unsqueeze(1)
    return (bits >> torch.arange(count)) % 2 == 1


def shapley_weights(count: int) -> Tensor:
    """What each set counts for each feature (Shapley 1953): ``[count, 2 ** count]`` in double precision.

    Positive where the feature is in the set, negative where it is not; the value of a feature is the sum of weights
    times worths.
    """
    present = all_coalitions(count)
    size = present.sum(1)
    of_size = [1 / (count * math.comb(count - 1, k)) for k in range(count)]
    weights = torch.tensor([*of_size, 0.0], dtype=torch.float64)
    joins, stays = weights[(size - 1).clamp(min=0)], weights[size]
    return torch.where(present.T, joins, -stays)


class Orders:
    """Random orders in which features come, as many as are asked for.

    Args:
        count: how many features.
        seed: of chance.
        antithetic: whether each order is followed by itself, backwards.
        stratified: whether an order is followed by all others that are it, shifted on place by place, so that each
            feature comes at each place once.

    Attributes:
        block: how many orders depend on each other.
    """

    def __init__(self, count: int, seed: int, *, antithetic: bool, stratified: bool) -> None:
        self._count, self._chance = count, random.Random(seed)
        self._shifts, self._antithetic = count if stratified else 1, antithetic
        self.block = self._shifts * (2 if antithetic else 1)

    def next(self, draws: int) -> Tensor:
        """The place of each feature in the next orders, ``[draws * block, count]``."""
        found: list[list[int]] = []
        for _ in range(draws):
            order = list(range(self._count))
            self._chance.shuffle(order)
            for shift in range(self._shifts):
                shifted = [(place + shift) % self._count for place in order]
                found.append(shifted)
                if self._antithetic:
                    found.append([self._count - 1 - place for place in shifted])
        return torch.tensor(found)
