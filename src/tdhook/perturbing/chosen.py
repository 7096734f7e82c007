"""Rows that a reference is made of, chosen by arithmetic alone."""

from __future__ import annotations

import random

import torch
from torch import Tensor

__all__ = ["chosen_rows"]

_PRIME = 2**31 - 1


def chosen_rows(
    seed: int, number: int | range, among: int, count: int, device: torch.device | None, first: int = 0
) -> Tensor:
    """The rows that a reference is made of, the same for all keys; or those of each of several.

    They follow from the seed by arithmetic alone (Carter and Wegman 1979), so that a compiled graph draws the same in
    each of its calls.

    Args:
        seed: of all references.
        number: which of these it is, or which of these they are.
        among: how many rows there are.
        count: how many are chosen, one for each element.
        device: of the numbers of rows.
        first: the number of the first element among all.

    Returns:
        ``[count]`` numbers of rows, of several references ``[references, count]``.
    """
    begin = first % _PRIME
    at = torch.arange(begin, begin + count, device=device)
    if isinstance(number, int):
        square, linear, start = _factors(seed, number)
        return ((square * at + linear) % _PRIME * at + start) % _PRIME % among
    each = torch.tensor([_factors(seed, one) for one in number], device=device)
    of_square, of_linear, of_start = each.unsqueeze(-1).unbind(1)
    return ((of_square * at + of_linear) % _PRIME * at + of_start) % _PRIME % among


def _factors(seed: int, number: int) -> list[int]:
    chance = random.Random(f"{seed} {number}")
    return [chance.randrange(1, _PRIME) for _ in range(3)]
