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

from tdhook.tape.functions import on_tape

__all__ = ["Stabilizer", "checked", "exact", "moved_away", "require_finite", "rounding", "stabilize"]

Stabilizer: TypeAlias = "float | Callable[[Tensor], Tensor]"
# bfloat16 has the exponents of float32: small numbers are as exact as large ones. Others, float16 among them: 1e-3.
_ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-6}


def stabilize(tensor: Tensor, epsilon: Stabilizer = 1e-6) -> Tensor:
    """Move a denominator away from zero.

    Args:
        tensor: any shape.
        epsilon: distance to add in the direction of the sign (zero counts as positive), or a callable
            ``denominator -> stabilised denominator``.

    Returns:
        ``tensor + epsilon * sign(tensor)``, same shape and dtype.
    """
    return epsilon(tensor) if callable(epsilon) else _moved(tensor, epsilon)


def _moved(tensor: Tensor, epsilon: float) -> Tensor:
    # Negative zero is zero: adding zero makes it positive.
    return _added(torch.copysign(_distance(tensor, epsilon), tensor + 0.0), tensor)


def moved_away(tensor: Tensor, epsilon: float) -> Tensor:
    """:func:`stabilize` where it does not matter which way a negative zero is moved."""
    return _added(torch.copysign(_distance(tensor, epsilon), tensor), tensor)


def _added(step: Tensor, tensor: Tensor) -> Tensor:
    """Their sum, in the memory of ``step`` unless the tape has kept it."""
    if torch.is_grad_enabled() and on_tape(step):
        return step + tensor
    return step.add_(tensor)


def _distance(tensor: Tensor, epsilon: float) -> Tensor:
    dtype = tensor.dtype if tensor.is_floating_point() else torch.get_default_dtype()
    if torch.compiler.is_compiling():
        return torch.full((), epsilon, dtype=dtype, device=tensor.device)
    return _number(epsilon, dtype, tensor.device)


@lru_cache
def _number(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.full((), value, dtype=dtype, device=device)


def rounding(tensor: Tensor) -> Tensor:
    """The stabiliser for what must not show: by precision (float64 1e-12, float32 and bfloat16 1e-6, else 1e-3)."""
    return _moved(tensor, _ROUNDING.get(tensor.dtype, 1e-3))


def exact(tensor: Tensor) -> Tensor:
    """The stabiliser that changes nothing: a denominator of zero gives a share of zero."""
    return torch.where(tensor == 0, torch.inf, tensor)


def checked(epsilon: Stabilizer, name: str = "stabilizer") -> Stabilizer:
    """The argument of a rule, if it can stabilise.

    Raises:
        TypeError: it is neither a number nor a callable.
        ValueError: it is negative, NaN or infinite.
    """
    if callable(epsilon):
        return epsilon
    if type(epsilon) not in (int, float):
        raise TypeError(f"{name} is a float or a callable on the denominator, got {epsilon!r}")
    require_finite(epsilon, name)
    if epsilon < 0:
        raise ValueError(f"{name} moves denominators away from zero, so it is not negative, got {epsilon!r}")
    return epsilon


def require_finite(value: object, name: str) -> None:
    """Make sure that the argument of a rule is a number to compute with.

    Raises:
        TypeError: it is none.
        ValueError: it is NaN or infinite.
    """
    if value is True or value is False or not isinstance(value, Real):
        raise TypeError(f"{name} is a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} is a finite number, got {value!r}")
