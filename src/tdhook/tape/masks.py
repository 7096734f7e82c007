"""Masks: values that say that something is to be left out, as masked logits do.

They are infinite, or among the least and greatest numbers that a precision has. Relevance in proportion to them is
nothing but rounding: accounts of relevance count none there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tdhook.tape.functions import may_look_at_once

__all__ = ["masking", "masks_in", "unmasked"]


def masking(x: Tensor) -> Tensor:
    """Which values mask; of the shape of ``x``, which is real."""
    return x.detach().abs() > _limit(x)


def masks_in(x: Tensor) -> Tensor | None:
    """Which values mask, or ``None`` if it is seen at a glance that none does."""
    if x.numel() and may_look_at_once(x):
        least, greatest = torch.aminmax(x.detach())
        if -_limit(x) <= least.item() and greatest.item() <= _limit(x):
            return None
    return masking(x)


def unmasked(amount: Tensor, x: Tensor) -> Tensor:
    """Amounts in proportion to values, and zero where these mask."""
    masks = masks_in(x)
    return amount if masks is None else torch.where(masks, 0.0, amount)


def _limit(x: Tensor) -> float:
    return torch.finfo(x.dtype).max / 2
