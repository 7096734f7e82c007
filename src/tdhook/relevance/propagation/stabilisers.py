"""Stabilisers: what keeps a denominator away from zero, ``stab(z) = z + eps * sign(z)`` with ``sign(0) = +1``.

Every argument named ``epsilon`` or ``stabilizer`` in this library is either that ``eps`` (a float) or a callable that
maps a denominator to its stabilised value.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from numbers import Real
from typing import TypeAlias

import torch
from torch import Tensor

from tdhook.tape.functions import on_tape, seen_finite

__all__ = [
    "Stabilizer",
    "checked",
    "kept_number",
    "left_of",
    "moved_away",
    "number",
    "plain_quotient",
    "quotient",
    "rounding",
    "saturated",
    "stabilize",
]

Stabilizer: TypeAlias = "float | Callable[[Tensor], Tensor]"
# An eighth of the largest number of float16: what is made of quotients still fits. Other precisions have the room.
_MOST = {torch.float16: 8192.0}


def stabilize(tensor: Tensor, epsilon: Stabilizer = 1e-6) -> Tensor:
    """Move a denominator away from zero.

    Args:
        tensor: any shape.
        epsilon: distance to add in the direction of the sign (zero counts as positive), or a callable
            ``denominator -> stabilised denominator``.

    Returns:
        ``tensor + epsilon * sign(tensor)``, same shape and dtype. With an epsilon of zero, what is zero has no share.
    """
    if epsilon == 0:
        return rounding(tensor)
    return epsilon(tensor) if callable(epsilon) else _moved(tensor, epsilon)


def _moved(tensor: Tensor, epsilon: float) -> Tensor:
    # Negative zero is zero: adding zero makes it positive.
    return _moved_along(tensor, tensor + 0.0, epsilon)


def moved_away(tensor: Tensor, epsilon: float) -> Tensor:
    """:func:`stabilize` where it does not matter which way a negative zero is moved."""
    return _moved_along(tensor, tensor, epsilon)


def _moved_along(tensor: Tensor, sign: Tensor, epsilon: float) -> Tensor:
    step = torch.copysign(_distance(tensor, epsilon), sign)
    # In its memory, unless the tape has kept it.
    return step + tensor if torch.is_grad_enabled() and on_tape(step) else step.add_(tensor)


def _distance(tensor: Tensor, epsilon: float) -> Tensor:
    dtype = tensor.dtype if tensor.is_floating_point() else torch.get_default_dtype()
    if torch.compiler.is_compiling():
        return torch.full((), epsilon, dtype=dtype, device=tensor.device)
    return kept_number(epsilon, dtype, tensor.device)


@lru_cache
def kept_number(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A number as a tensor, which is made once. No graph must be traced meanwhile, which would not know it."""
    with torch.inference_mode(False):
        return torch.full((), value, dtype=dtype, device=device)


def rounding(tensor: Tensor) -> Tensor:
    """The stabiliser of what no user asked to be stabilised: it adds nothing, so that no precision is given up.

    A denominator of zero, or one that is too small for what it divides to be a number, gives a share of zero. The small
    numbers of float16 are no smaller than others make of rounding: there zero alone does, and quotients are
    :func:`saturated`.
    """
    return torch.where(_is_nothing(tensor), torch.inf, tensor)


def _is_nothing(tensor: Tensor) -> Tensor:
    if tensor.dtype is torch.float16 or not tensor.is_floating_point():
        return tensor == 0
    return tensor.abs() < torch.finfo(tensor.dtype).tiny


def quotient(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Their quotient, :func:`saturated`."""
    return saturated(numerator / denominator)


def left_of(z: Tensor, epsilon: Stabilizer) -> Tensor:
    """What a stabiliser leaves of each value, ``z / stab(z)``."""
    if epsilon is rounding:
        return plain_quotient(z, z)
    if callable(epsilon) or epsilon == 0 or not z.is_floating_point():
        return quotient(z, stabilize(z, epsilon))
    # Of a sum and a quotient of the same sign the sign makes no difference: ``|z| / (|z| + eps)``.
    size = z.abs()
    return size.div_(size + epsilon)


def plain_quotient(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Their quotient where nothing is stabilised, by :func:`rounding`."""
    found = numerator / denominator
    return saturated(found) if seen_finite(found) else quotient(numerator, rounding(denominator))


def saturated(tensor: Tensor) -> Tensor:
    """The same, but that in float16, which soon overflows, nothing is larger than 8192."""
    most = _MOST.get(tensor.dtype)
    return tensor if most is None else tensor.clamp(-most, most)


def checked(epsilon: Stabilizer, name: str = "stabilizer") -> Stabilizer:
    """The argument of a rule, if it can stabilise.

    Raises:
        TypeError: it is neither a number nor a callable.
        ValueError: it is negative, NaN or infinite.
    """
    if callable(epsilon):
        return epsilon
    if not _is_number(epsilon):
        raise TypeError(f"{name} is a float or a callable on the denominator, got {epsilon!r}")
    epsilon = number(epsilon, name)
    if epsilon < 0:
        raise ValueError(f"{name} moves denominators away from zero, so it is not negative, got {epsilon!r}")
    return epsilon


def number(value: float, name: str) -> float:
    """The argument of a rule, if it is a number.

    Raises:
        TypeError: it is none.
        ValueError: it is NaN or infinite.
    """
    if not _is_number(value):
        raise TypeError(f"{name} is a number, got {value!r} of type {type(value).__name__}")
    try:
        # What plain data can hold, whoever's number it is.
        plain = value if type(value) is int else float(value)
        finite = math.isfinite(plain)
    except OverflowError:
        finite = False
    if not finite:
        raise ValueError(f"{name} is a finite number, got {value!r}")
    return plain


def _is_number(value: object) -> bool:
    # Those of numpy count, but for its booleans.
    return isinstance(value, int | float | Real) and not isinstance(value, bool)
