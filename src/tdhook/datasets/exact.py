"""Exact sums: the same bits in whatever order numbers are added, and however they are cut into parts.

A sum is kept as whole numbers of 32 bits each, as in a number of many digits, from 2^-192 up.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["DIGITS", "carried", "digits_of", "value_of"]

DIGITS = 12
_LOWEST = -192
_BITS = 32
_MASK = (1 << _BITS) - 1
_MANTISSA = 53


def digits_of(values: Tensor, cells: Tensor, count: int) -> Tensor:
    """The sums of numbers that are not negative, ``[count, DIGITS]``.

    What of a number is below 2^-192 is cut off.

    Args:
        values: double precision, ``[numbers]``.
        cells: to which sum each belongs, ``[numbers]``.
        count: how many sums there are.

    Raises:
        OverflowError: a number is above 2^180.
    """
    fraction, exponent = torch.frexp(values)
    whole = torch.ldexp(fraction, torch.tensor(_MANTISSA)).long()
    shift = exponent.long() - _MANTISSA - _LOWEST
    whole = whole >> (-shift).clamp(0, 63)
    shift = torch.where(whole == 0, 0, shift.clamp(min=0))
    place, rest = shift // _BITS, shift % _BITS
    if len(place) and int(place.max()) > DIGITS - 3:
        raise OverflowError(f"{float(values.max()):.3g} is too large to be summed: relevance is below 2^180")
    low = (whole & _MASK) << rest
    high = ((whole >> _BITS) << rest) + (low >> _BITS)
    sums = torch.zeros(count * DIGITS, dtype=torch.int64)
    at = cells * DIGITS + place
    for i, digit in enumerate((low & _MASK, high & _MASK, high >> _BITS)):
        sums.scatter_add_(0, at + i, digit)
    return carried(sums.reshape(count, DIGITS))


def carried(sums: Tensor) -> Tensor:
    """Sums of digits, ``[..., DIGITS]``, with what is above 32 bits carried on: one way to write each number."""
    carry = torch.zeros_like(sums[..., 0])
    found = []
    for digit in sums.unbind(-1):
        whole = digit + carry
        found.append(whole & _MASK)
        carry = whole >> _BITS
    return torch.stack(found, -1)


def value_of(sums: Tensor) -> Tensor:
    """Sums as numbers of double precision, ``[...]``."""
    scale = torch.exp2(torch.arange(DIGITS, dtype=torch.float64) * _BITS + _LOWEST)
    value = torch.zeros(sums.shape[:-1], dtype=torch.float64)
    for i in reversed(range(DIGITS)):
        value = value + sums[..., i].double() * scale[i]
    return value
