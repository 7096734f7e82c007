"""The two conventions of what travels backwards: relevance ``R``, or that per unit of activation, ``g = R / z``."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

__all__ = ["Convention", "per_value", "relevance_of"]

Convention: TypeAlias = Literal["relevance", "gradient"]


def relevance_of(value: Tensor, found: Tensor, flow: Convention) -> Tensor:
    """The relevance of a value, given what travelled to it: itself, or ``value * g``.

    Args:
        value: ``[*shape]``; an infinite one (a masked logit) has no relevance where nothing travelled to it.
        found: what arrived, of the same shape or with leading axes.
        flow: the convention in which it travelled.
    """
    return found if flow == "relevance" else torch.where(found == 0, 0.0, value.detach() * found)


def per_value(value: Tensor, relevance: Tensor) -> Tensor:
    """``g = R / z``, and zero where the value is zero."""
    value = value.detach()
    return torch.where(value == 0, 0.0, relevance / torch.where(value == 0, 1.0, value))
