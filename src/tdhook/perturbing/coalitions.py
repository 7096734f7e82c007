"""Coalitions: which features are there, and with what weight."""

from __future__ import annotations

import math
import random

import torch
from torch import Tensor

__all__ = ["all_coalitions", "permutations", "shapley_weights"]


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


def permutations(count: int, orders: int, seed: int, *, antithetic: bool, stratified: bool) -> Tensor:
    """Random orders in which features come: the place of each, ``[orders, count]``.

    Args:
        count: how many features.
        orders: how many orders.
        seed: of chance; the first orders of many are those of few.
        antithetic: whether each second order is the one before, backwards.
        stratified: whether ``count`` orders after each other, or as many pairs, are one shifted on place by place, so
            that each feature comes at each place once.
    """
    chance = random.Random(seed)
    found: list[list[int]] = []
    while len(found) < orders:
        order = list(range(count))
        chance.shuffle(order)
        for shift in range(count if stratified else 1):
            shifted = [(place + shift) % count for place in order]
            found.append(shifted)
            if antithetic:
                found.append([count - 1 - place for place in shifted])
    return torch.tensor(found[:orders])
