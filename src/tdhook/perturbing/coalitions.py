"""Coalitions: which features are there, and with what weight."""

from __future__ import annotations

import math
import random
from collections.abc import Collection
from itertools import combinations

import torch
from torch import Tensor

__all__ = [
    "Orders",
    "all_coalitions",
    "interaction_weights",
    "kernel_coalitions",
    "kernel_sizes",
    "shapley_weights",
]


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


def kernel_sizes(count: int) -> list[float]:
    """How likely a coalition of each size, ``1`` to ``count - 1``, is under the Shapley kernel."""
    weights = [1 / (size * (count - size)) for size in range(1, count)]
    return [weight / sum(weights) for weight in weights]


def kernel_coalitions(count: int, most: int, seed: int) -> tuple[Tensor, Tensor]:
    """Coalitions and their weights in the regression of Kernel SHAP (Lundberg and Lee 2017, theorem 2).

    Sizes of which all coalitions fit are there whole, from those of one feature and of all but one inwards, which weigh
    the most; what is left is drawn from the other sizes by their weights, each coalition with its complement.

    Args:
        count: how many features, at least two.
        most: how many coalitions at most.
        seed: of chance.

    Returns:
        Truth values ``[coalitions, count]``, none of them empty or full; and weights ``[coalitions]``.
    """
    rest = dict(enumerate(kernel_sizes(count), start=1))
    found: list[list[bool]] = []
    weights: list[float] = []
    for size in range(1, count // 2 + 1):
        sizes = {size, count - size}
        number = math.comb(count, size)
        if len(found) + len(sizes) * number > most:
            break
        for each in sorted(sizes):
            found += [_of(chosen, count) for chosen in combinations(range(count), each)]
            weights += [rest.pop(each) / number] * number
    pairs = (most - len(found)) // 2 if found else max(1, most // 2)
    if rest and pairs:
        chance = random.Random(seed)
        for size in chance.choices(list(rest), list(rest.values()), k=pairs):
            there = _of(chance.sample(range(count), size), count)
            found += [there, [not one for one in there]]
        weights += [sum(rest.values()) / (2 * pairs)] * (2 * pairs)
    return torch.tensor(found), torch.tensor(weights, dtype=torch.float64)


def _of(chosen: Collection[int], count: int) -> list[bool]:
    return [feature in chosen for feature in range(count)]


def interaction_weights(count: int) -> Tensor:
    """What each set counts for each pair of features (Grabisch and Roubens 1999): ``[count, count, 2 ** count]``.

    On the diagonal are those of :func:`shapley_weights`.
    """
    present = all_coalitions(count).double()
    sign = 2 * present.T - 1
    both = sign.unsqueeze(0) * sign.unsqueeze(1)
    others = present.sum(1) - present.T.unsqueeze(0) - present.T.unsqueeze(1)
    of_size = [1 / ((count - 1) * math.comb(count - 2, k)) for k in range(count - 1)]
    weights = both * torch.tensor([*of_size, 0.0, 0.0], dtype=torch.float64)[others.long().clamp(min=0)]
    each = torch.arange(count)
    weights[each, each] = shapley_weights(count)
    return weights
