"""Telling variants: by which it is seen best whether some that lie side by side leave each other alone."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook.tape.conditions import is_traced

__all__ = ["telling"]


def telling(
    changed: Mapping[NestedKey, Tensor], there: Mapping[NestedKey, Tensor], dtype: torch.dtype
) -> Tensor:
    """The numbers of one or two variants, ``[numbers]``.

    That is the one that changed most, and one whose largest entry is another, and as few others as may be, if it is
    more than zero, which stays zero in whatever measure it is taken.

    Args:
        changed: the variants, ``[variants, *source]`` by key; at least one key.
        there: the sources as they are.
        dtype: the precision in which they are compared.
    """
    first = next(iter(changed.values()))
    apart = torch.zeros(len(first), dtype=dtype, device=first.device)
    tells, is_zero = torch.zeros_like(apart), torch.ones_like(apart, dtype=torch.bool)
    for key, value in changed.items():
        flat, as_it_is = value.detach().reshape(len(value), -1), there[key].reshape(-1)
        size, place = as_it_is.abs().max(0, keepdim=True)
        off = ((flat - as_it_is).abs() / size).to(apart).nan_to_num(0.0)
        apart, is_zero = apart + off.mean(1), is_zero & (flat == 0).all(1)
        tells = tells + off.index_select(1, place).squeeze(1) - off.mean(1) / 4
    tells = torch.where(is_zero, -torch.inf, tells)
    which = torch.stack([apart.argmax(), tells.argmax()])  # tensors, as a graph needs them
    return which if is_traced() else which.unique()
