"""Quadrature: where on the way from one value to another to look, and how much each look counts."""

from __future__ import annotations

import math
from functools import lru_cache

__all__ = ["gauss_legendre"]


@lru_cache
def gauss_legendre(count: int) -> tuple[tuple[float, float], ...]:
    """Places in ``[0, 1]`` and their weights, which sum to one: roots of a Legendre polynomial, by Newton's method.

    Exact for polynomials of degree below ``2 count``. No tensors are made, so that nothing is traced of it.

    Raises:
        ValueError: there is no place.
    """
    if count < 1:
        raise ValueError(f"at least one gradient is averaged, got steps={count}")
    found = []
    for k in range(count, 0, -1):
        x = math.cos(math.pi * (k - 0.25) / (count + 0.5))
        for _ in range(100):
            value, slope = _legendre(count, x)
            step = value / slope
            x -= step
            if abs(step) < 1e-16:
                break
        slope = _legendre(count, x)[1]
        found.append(((x + 1) / 2, 1 / ((1 - x * x) * slope * slope)))
    return tuple(found)


def _legendre(degree: int, x: float) -> tuple[float, float]:
    """A Legendre polynomial and its derivative, inside of ``(-1, 1)``, by the recurrence of three terms."""
    before, value = 0.0, 1.0
    for k in range(1, degree + 1):
        before, value = value, ((2 * k - 1) * x * value - (k - 1) * before) / k
    return value, degree * (x * value - before) / (x * x - 1)
