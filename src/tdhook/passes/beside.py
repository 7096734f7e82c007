"""Beside: a batch many times over, as further rows or along an axis before, and what is found of it, apart again."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

__all__ = ["Answer", "Ask", "Change", "beside", "parted", "without"]

Change: TypeAlias = "Callable[[range], Mapping[NestedKey, Tensor]]"
"""Given numbers of variants, what takes the place of sources there: ``[variants, *source]`` by key."""

Ask: TypeAlias = (
    "Callable[[TensorDictBase, Mapping[NestedKey, Tensor]], tuple[Tensor, Mapping[NestedKey, Tensor]]]"
)
"""Given a batch, and what takes the place of sources: what is explained of each element, and more by source."""


@dataclass(frozen=True)
class Answer:
    """What the model answers to some variants.

    Attributes:
        numbers: which these are.
        values: what is explained of each element, ``[variants, *batch]`` or ``[variants, outputs, *batch]``.
        found: by source, ``[variants, *source]`` or ``[variants, outputs, *source]``.
    """

    numbers: range
    values: Tensor
    found: dict[NestedKey, Tensor]


def beside(
    td: TensorDictBase,
    copies: int,
    replaced: Mapping[NestedKey, Tensor],
    inputs: Collection[NestedKey],
    *,
    rows: bool,
) -> TensorDictBase:
    """A batch so many times over: as rows ``[copies * first, *rest]``, or ``[copies, *batch]``.

    As rows the entries are copied, but for those inputs that are replaced.
    """
    if not rows or not td.batch_dims:
        return td.expand(copies, *td.batch_size)
    given = [key for key in replaced if key in inputs and isinstance(key, str)]
    # Integers stay what they are.
    given = [key for key in given if td.get(key).dtype == replaced[key].dtype]
    around = td.exclude(*given) if given else td
    found = around.expand(copies, *td.batch_size).reshape(-1, *td.batch_size[1:])
    for key in given:
        found.set(key, replaced[key])
    return found


def parted(value: Tensor, copies: int, shape: torch.Size, several: bool) -> Tensor:
    """What was found of variants side by side: ``[copies, *shape]``, or ``[copies, outputs, *shape]``."""
    lead = value.shape[:several]
    value = value.reshape(*lead, copies, *shape)
    return value.movedim(0, 1) if several else value


def without(value: Tensor, place: int, count: int) -> Tensor:
    """All of ``count + 1`` variants but that in one place."""
    return torch.cat([value[:place], value[place + 1 : count + 1]])
