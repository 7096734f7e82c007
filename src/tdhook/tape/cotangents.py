"""Cotangents: what is pulled back through a function to learn of which kind it is."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["cotangent", "equal_but_for_rounding", "rounding_of"]

# By how much products of numbers may differ that are the same but for rounding.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


def cotangent(z: Tensor, seed: int) -> Tensor:
    """Numbers between 1/2 and 3/2 without a pattern, of which the generator of random numbers knows nothing."""
    count = torch.arange(z.numel(), dtype=torch.float64, device=z.device)
    return (1 + 0.5 * torch.sin((count + 1) * (12.9898 * seed))).to(z.dtype).reshape(z.shape)


def equal_but_for_rounding(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same."""
    return bool(((a - b).abs() <= rounding_of(a) * (a.abs() + b.abs())).all())


def rounding_of(x: Tensor) -> float:
    """What part of its size a product of numbers may be off."""
    return _TOLERANCE.get(x.dtype, 2e-2)
