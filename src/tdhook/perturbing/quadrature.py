"""Quadrature: where on the way from one value to another to look, and how much each look counts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import TypeAlias

__all__ = ["QUADRATURES", "gauss_legendre", "quadrature"]

Rule: TypeAlias = "tuple[tuple[float, float], ...]"
"""Places in ``[0, 1]`` and their weights, which sum to one."""


@lru_cache
def gauss_legendre(count: int) -> Rule:
    """Places in ``[0, 1]`` and their weights, which sum to one: roots of a Legendre polynomial, by Newton's method.

    Exact for polynomials of degree below ``2 count``. No tensors are made, so that nothing is traced of it.
    """
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


def _riemann(offset: float) -> Callable[[int], Rule]:
    """As many stretches of the same length, each looked at in one place."""
    return lambda count: tuple(((i + offset) / count, 1 / count) for i in range(count))


def _trapezoid(count: int) -> Rule:
    """The ends, and places between them at the same distance."""
    if count < 2:
        raise ValueError(
            f"the trapezoid rule looks at both ends, so that it has at least 2 steps, got steps={count}"
        )
    return tuple((i / (count - 1), (1 - 0.5 * (i in (0, count - 1))) / (count - 1)) for i in range(count))


QUADRATURES: Mapping[str, Callable[[int], Rule]] = {
    "gauss_legendre": gauss_legendre,
    "trapezoid": _trapezoid,
    "left": _riemann(0.0),
    "middle": _riemann(0.5),
    "right": _riemann(1.0),
}


def quadrature(name: str, count: int) -> Rule:
    """So many places and weights by the rule of a name.

    Raises:
        ValueError: there is no such rule, or no place.
    """
    if name not in QUADRATURES:
        raise ValueError(f"no quadrature is named {name!r}; there are {', '.join(QUADRATURES)}")
    if count < 1:
        raise ValueError(f"at least one gradient is averaged, got steps={count}")
    return QUADRATURES[name](count)
