"""What features are worth, written out coalition by coalition."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import combinations

import torch
from torch import Tensor

Worth = Callable[[frozenset[int]], Tensor]


def worth_of(function: Callable[[Tensor], Tensor], x: Tensor, baseline: Tensor, groups: Tensor) -> Worth:
    """The worth of coalitions of groups of ``x [rows, *shape]``."""

    def worth(present: frozenset[int]) -> Tensor:
        there = torch.zeros_like(groups, dtype=torch.bool)
        for feature in present:
            there |= groups == feature
        there |= groups < 0
        return function(torch.where(there, x, baseline))

    return worth


def subsets(of: Iterable[int]) -> list[frozenset[int]]:
    players = list(of)
    return [frozenset(c) for size in range(len(players) + 1) for c in combinations(players, size)]


def shapley(worth: Worth, count: int) -> Tensor:
    """The Shapley value of each, ``[features, rows]``."""
    found = []
    for feature in range(count):
        total = torch.zeros(())
        for others in subsets(set(range(count)) - {feature}):
            weight = 1 / (count * math.comb(count - 1, len(others)))
            total = total + weight * (worth(others | {feature}) - worth(others))
        found.append(total)
    return torch.stack(found)


def interaction(worth: Worth, count: int, i: int, j: int) -> Tensor:
    """The Shapley interaction index of a pair, ``[rows]``."""
    total = torch.zeros(())
    for others in subsets(set(range(count)) - {i, j}):
        weight = 1 / ((count - 1) * math.comb(count - 2, len(others)))
        change = worth(others | {i, j}) - worth(others | {i}) - worth(others | {j}) + worth(others)
        total = total + weight * change
    return total
