"""Patches: the parts of a place, put there one by one."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook.attribution.parts import Parts
from tdhook.passes.variants import Variants

__all__ = ["Patches"]


class Patches:
    """The patches of one place, a part each.

    Along axes of the batch where elements depend on each other, each element is patched alone, and has what becomes of
    the target of all: as with gradients, which are those of the sum.

    Args:
        change: what a patch of all of it changes, ``[*lead, *features]``.
        into: what is there.
        put: what is put there.
        parts: tells its parts apart.
        lead: how many of its axes are those of the batch.
        name: of the place.
        batch: the batch size.
        axes: those of the batch along which elements have nothing to do with each other.
    """

    def __init__(
        self,
        change: Tensor,
        into: Tensor,
        put: Tensor,
        parts: Parts,
        lead: int,
        name: NestedKey,
        batch: torch.Size,
        axes: Sequence[int],
    ) -> None:
        features = change.shape[lead:]
        self._into, self._put = into, put
        self._shape = parts.shape(features, name)
        self._batch, self._meeting = batch, [axis for axis in range(len(batch)) if axis not in axes]
        places = [size if axis in self._meeting else 1 for axis, size in enumerate(batch)]
        place = torch.arange(prod(places), device=change.device).reshape(places).expand(batch)
        place = place.reshape((*change.shape[:lead], *(1,) * len(features)))
        self._numbers = place * prod(self._shape) + parts.numbers(features, name, change.device)
        self._count = prod(places) * prod(self._shape)
        self._wanted = torch.arange(self._count, device=change.device)
        if not torch.compiler.is_compiling():  # where both runs are the same, nothing changes
            self._wanted = self._numbers[change != 0].unique()

    def effects(self, variants: Variants, key: NestedKey) -> Tensor:
        """What each does to the target, ``[*batch, *parts]`` or ``[*batch, outputs, *parts]``."""
        before = variants.values
        meeting = [variants.several + axis for axis in self._meeting]
        rest = before.sum(meeting) if meeting else before
        found = before.new_zeros(self._count, *rest.shape)

        def changed(some: range) -> dict[NestedKey, Tensor]:
            chosen = self._wanted[some.start : some.stop].reshape(-1, *(1,) * self._into.dim())
            return {key: torch.where(self._numbers == chosen, self._put, self._into)}

        for answer in variants.answers(len(self._wanted), changed):
            gained = answer.values - before
            gained = gained.sum([1 + axis for axis in meeting]) if meeting else gained
            found[self._wanted[answer.numbers.start : answer.numbers.stop]] = gained
        places = [self._batch[axis] for axis in self._meeting]
        found = found.reshape(*places, prod(self._shape), *rest.shape).movedim(len(places), -1)
        found = found.movedim(len(places), 0) if variants.several else found
        found = found.movedim(list(range(variants.several, variants.several + len(places))), meeting)
        found = found.reshape((*before.shape, *self._shape))
        return found.movedim(0, len(variants.batch)) if variants.several else found
