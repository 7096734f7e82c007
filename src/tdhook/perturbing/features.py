"""What counts as one feature: an entry of an input, or a group of entries that are replaced together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor

from tdhook.keys import parts_of

__all__ = ["Features", "Groups", "along", "patches"]

Groups: TypeAlias = "Tensor | Mapping[NestedKey, Tensor] | None"
"""For each entry of an input (of each, by key) the number of its group; negative ones are left alone.

Truth values say which entries count, each as a feature of its own. Shapes are those of one element of the batch.
"""


def patches(shape: Sequence[int], size: int | tuple[int, int]) -> Tensor:
    """Groups for pictures: squares of pixels, of all channels (frames) together.

    Args:
        shape: of one picture, ``[*channels, height, width]``.
        size: of a patch, one number or ``(height, width)``; those at the far edges may be smaller.

    Returns:
        Group numbers ``[*channels, height, width]``, row by row.

    Raises:
        ValueError: that is no shape of a picture, or no size.
    """
    tall, wide = (size, size) if isinstance(size, int) else size
    if len(shape) < 2 or min(tall, wide) < 1:
        raise ValueError(
            f"patches of size {size} of a picture of shape {list(shape)}: a picture has a height and a width, a patch "
            "at least one pixel"
        )
    height, width = shape[-2:]
    across = -(-width // wide)
    rows, columns = torch.arange(height) // tall, torch.arange(width) // wide
    return (rows[:, None] * across + columns).expand((*shape,))


def along(shape: Sequence[int], *axes: int) -> Tensor:
    """Groups of the entries that share their place along some axes.

    ``along((4, 84, 84), 0)`` makes each frame of a stack a feature, ``along((4, 84, 84), 1, 2)`` each pixel, with all
    of its frames.

    Args:
        shape: of one input.
        axes: those along which entries are told apart.

    Returns:
        Group numbers ``[*shape]``.

    Raises:
        IndexError: there is no such axis.
    """
    numbers, count = torch.zeros(tuple(shape), dtype=torch.int64), 1
    for axis in sorted({_axis(axis, len(shape)) for axis in axes}):
        size = shape[axis]
        place = torch.arange(size).reshape(-1, *(1,) * (len(shape) - axis - 1))
        numbers = numbers * size + place
        count *= size
    return numbers


def _axis(axis: int, count: int) -> int:
    if not -count <= axis < count:
        raise IndexError(f"there is no axis {axis} in a shape of {count}")
    return axis % count


@dataclass(frozen=True, eq=False)
class Features:
    """The features of some inputs, those of all keys in one line.

    Attributes:
        keys: the inputs.
        sizes: entries of each, per row.
        groups: ``[entries]``, the number of the feature that each entry belongs to; ``count`` for entries left alone.
        count: the number of features.
    """

    keys: tuple[NestedKey, ...]
    sizes: tuple[int, ...]
    groups: Tensor
    count: int

    @staticmethod
    def of(rows: TensorDictBase, keys: Sequence[NestedKey], groups: Groups = None) -> Features:
        """The features of ``keys`` in ``rows [rows, *rest]``.

        Raises:
            KeyError: an input is missing.
            TypeError: an input is not floating-point, or groups are not numbers.
            ValueError: groups do not fit, or leave no feature.
        """
        named = _by_key(groups, keys)
        numbers, sizes, count = [], [], 0
        for key in keys:
            value = rows.get(key, None)
            if value is None:
                there = [one for one in rows.keys(True, True) if not parts_of(one)[0].startswith("_")]
                known = ", ".join(sorted(map(str, there)))
                raise KeyError(
                    f"key {key!r} has relevance and is missing from the TensorDict, which has {known}: say which are "
                    "replaced, by keys="
                )
            if not value.is_floating_point():
                raise TypeError(f"input {key!r} is {value.dtype}; only floating-point inputs are replaced")
            size = value[0].numel()
            own = _numbers(named.get(key), key, value)
            kept = own >= 0
            _, own[kept] = own[kept].unique(return_inverse=True)
            found = int(own.max()) + 1 if size else 0
            own[kept] += count
            own[~kept] = -1
            numbers.append(own)
            sizes.append(size)
            count += found
        if count == 0:
            raise ValueError(f"the groups leave no feature of {', '.join(map(repr, keys))} to replace")
        joined = torch.cat(numbers)
        return Features(tuple(keys), tuple(sizes), torch.where(joined < 0, count, joined), count)

    def flat(self, values: Mapping[NestedKey, Tensor]) -> Tensor:
        """Values by key, ``[rows, *shape]``, in one line: ``[rows, entries]``."""
        return torch.cat([values[key].reshape(len(values[key]), -1) for key in self.keys], 1)

    @property
    def extent(self) -> Tensor:
        """How many entries each feature has, ``[features]``."""
        return self.groups.bincount(minlength=self.count + 1)[: self.count]

    @property
    def alike(self) -> bool:
        """Whether all features have as many entries."""
        extent = self.extent
        return bool((extent == extent[0]).all())

    def by_entry(self, relevance: Mapping[NestedKey, Tensor]) -> Tensor:
        """Relevance of each feature for each of its entries, ``[rows, features]``: the mean over them.

        By the sum, a large feature would come first wherever relevance is mostly positive, whatever it is worth.
        """
        flat = self.flat(relevance).to(torch.float64)
        total = flat.new_zeros(len(flat), self.count + 1)
        total = total.index_add_(1, self.groups.to(flat.device), flat)[:, : self.count]
        return total if self.alike else total / self.extent.to(flat.device)

    def entries(self, chosen: Tensor) -> dict[NestedKey, Tensor]:
        """Which entries belong to chosen features.

        Args:
            chosen: truth values ``[rows, features]``.

        Returns:
            Truth values ``[rows, size]`` by key.
        """
        padded = torch.nn.functional.pad(chosen, (0, 1))  # entries that are left alone are never chosen
        split = padded[:, self.groups.to(chosen.device)].split(self.sizes, 1)
        return dict(zip(self.keys, split, strict=True))

    def replaced(
        self, rows: TensorDictBase, baseline: Mapping[NestedKey, Tensor], chosen: Tensor
    ) -> TensorDictBase:
        """``rows`` with the chosen features ``[rows, features]`` taken from ``baseline [rows, *shape]``."""
        changed = rows.copy()
        for key, where in self.entries(chosen).items():
            value = rows.get(key)
            changed.set(key, torch.where(where.reshape(value.shape), baseline[key], value))
        return changed


def _by_key(groups: Groups, keys: Sequence[NestedKey]) -> dict[NestedKey, Tensor]:
    if groups is None:
        return {}
    if isinstance(groups, Tensor):
        if len(keys) != 1:
            raise ValueError(
                f"groups are given for one input, and there are {', '.join(map(repr, keys))}: give them by key"
            )
        return {keys[0]: groups}
    named = {unravel_key(key): value for key, value in groups.items()}
    for key in named:
        if key not in keys:
            raise ValueError(f"groups are given for {key!r}, which is none of {', '.join(map(repr, keys))}")
    return named


def _numbers(groups: Tensor | None, key: NestedKey, value: Tensor) -> Tensor:
    """A fresh ``[size]`` of group numbers for one input."""
    shape = value.shape[1:]
    if groups is None:
        return torch.arange(shape.numel())
    if groups.shape != shape:
        raise ValueError(
            f"the groups of {key!r} have shape {list(groups.shape)}; one element of the batch has {list(shape)}"
        )
    groups = groups.cpu().flatten()
    if groups.dtype is torch.bool:
        return torch.where(groups, torch.arange(len(groups)), -1)
    if groups.is_floating_point() or groups.is_complex():
        raise TypeError(f"the groups of {key!r} are numbers or truth values, got {groups.dtype}")
    return groups.to(torch.int64, copy=True)
