"""Drawn: one reference, and what it is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor

from tdhook.keys import entry_at, parts_of
from tdhook.perturbing.baselines import OneBaseline, fitting
from tdhook.perturbing.before import PREVIOUS

__all__ = ["NAMES", "Drawn", "entry_named", "is_one_row", "laid_out_as", "mean_of"]

NAMES = ("mean", "sample", PREVIOUS)
"""The baselines that have a name of their own."""


@dataclass
class Drawn:
    """One reference.

    Attributes:
        replaced: what takes the place of attributed values, of the same shapes; one row for all lies in memory once.
        entries: what takes the place of entries that are read and not attributed.
    """

    replaced: dict[NestedKey, Tensor] = field(default_factory=dict)
    entries: dict[NestedKey, Tensor] = field(default_factory=dict)

    def laid_out_as(self, values: Mapping[NestedKey, Tensor]) -> dict[NestedKey, Tensor]:
        """What replaces values, with their strides."""
        return {key: laid_out_as(values[key], made) for key, made in self.replaced.items()}


def is_one_row(given: OneBaseline, dims: int) -> bool:
    """Whether a baseline is a number, or a tensor that is one row for all."""
    if isinstance(given, str | tuple) or callable(given):
        return False
    return torch.as_tensor(given).dim() <= dims


def mean_of(rows: Tensor) -> Tensor:
    """The mean row; of integers it has fractions."""
    return rows.to(rows.dtype if rows.is_floating_point() else torch.get_default_dtype()).mean(0)


def laid_out_as(value: Tensor, made: Tensor) -> Tensor:
    """With the strides of a value: a model may ask for these, as it does before it overwrites."""
    return made if made.stride() == value.stride() else torch.empty_like(value).copy_(made)


def entry_named(name: NestedKey, key: NestedKey, value: Tensor, td: TensorDictBase) -> Tensor:
    """The baseline of a value that an entry of the TensorDict holds, under its own name or as it is."""
    under = unravel_key((*parts_of(name), *parts_of(key)))
    for candidate in (under, unravel_key(name)):
        found = entry_at(td, parts_of(candidate))
        if isinstance(found, Tensor):
            return fitting(found, key, value)
    raise KeyError(
        f"baseline {name!r} is neither {', '.join(map(repr, NAMES))} nor an entry of the TensorDict, which has "
        f"{', '.join(map(repr, td.keys(True, True)))}"
    )
