"""The patches of a place: its parts, each replaced by what it is in the other run."""

from __future__ import annotations

from math import prod

import torch
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook.attribution.parts import Parts
from tdhook.passes.variants import Variants

__all__ = ["Patches"]


class Patches:
    """The patches of one place, a part each.

    Args:
        change: what a patch of all of it changes, ``[*lead, *features]``.
        into: what is there.
        put: what is put there.
        parts: tells its parts apart.
        lead: how many of its axes are those of the batch.
        name: of the place.
    """

    def __init__(
        self, change: Tensor, into: Tensor, put: Tensor, parts: Parts, lead: int, name: NestedKey
    ) -> None:
        features = change.shape[lead:]
        self._into, self._put = into, put
        self._numbers = parts.numbers(features, name, change.device)
        self._shape = parts.shape(features, name)
        self._wanted = torch.arange(prod(self._shape), device=change.device)
        if not torch.compiler.is_compiling():  # where both runs are the same, nothing changes
            differs = (change != 0).reshape(-1, *features).any(0)
            self._wanted = self._numbers[differs].unique()

    def effects(self, variants: Variants, key: NestedKey) -> Tensor:
        """What each does to the target, ``[*batch, *parts]`` or ``[*batch, outputs, *parts]``."""
        before = variants.values
        found = before.new_zeros(prod(self._shape), *before.shape)

        def changed(some: range) -> dict[NestedKey, Tensor]:
            chosen = self._wanted[some.start : some.stop].reshape(-1, *(1,) * self._into.dim())
            return {key: torch.where(self._numbers == chosen, self._put, self._into)}

        for answer in variants.answers(len(self._wanted), changed):
            found[self._wanted[answer.numbers.start : answer.numbers.stop]] = answer.values - before
        found = found.movedim(0, -1).reshape(*before.shape, *self._shape)
        return found.movedim(0, len(variants.batch)) if variants.several else found
