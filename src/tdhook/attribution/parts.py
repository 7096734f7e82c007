"""Parts of a layer: which of its values are looked at together, as one position, head, unit, or all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook.targets.units import equal_heads, feature_axis

__all__ = ["Parts"]


@dataclass(frozen=True)
class Parts:
    """How a layer is taken apart.

    Args:
        axes: those of the layer along which parts are told apart, the batch being the first, 0; negative ones from the
            end. None of them makes one part of all; ``None`` one of each value.
        heads: the last of the axes is so many equal pieces side by side, each of which is one; by default each value
            along it is.
    """

    axes: tuple[int, ...] | None = None
    heads: int | None = None

    @staticmethod
    def of(axis: int | Sequence[int] | None, heads: int | None) -> Parts:
        """As it is written.

        Raises:
            ValueError: there are heads and no axis that they lie along.
        """
        if axis is None and heads is not None:
            axis = -1
        axes = (axis,) if isinstance(axis, int) else None if axis is None else tuple(axis)
        if heads is not None and (heads < 1 or not axes):
            raise ValueError(
                f"heads are at least one, along the last of some axes; got heads={heads}, axis={axis}"
            )
        return Parts(axes, heads)

    def shape(self, features: Sequence[int], name: NestedKey) -> tuple[int, ...]:
        """How many parts there are along each axis, in the order in which the axes lie.

        Args:
            features: the shape of the layer without the batch.
            name: of the layer, for messages.
        """
        if self.axes is None:
            return tuple(features)
        axes, headed = self._axes(features, name)
        return tuple(self._count(features, name) if axis == headed else features[axis] for axis in axes)

    def summed(self, amounts: Tensor, features: Sequence[int], name: NestedKey) -> Tensor:
        """The sum of what belongs to each part.

        Args:
            amounts: ``[..., *features]``.
            features: the shape of the layer without the batch.
            name: of the layer.

        Returns:
            ``[..., *parts]``.
        """
        if self.axes is None:
            return amounts
        axes, headed = self._axes(features, name)
        lead = amounts.dim() - len(features)
        if headed is not None:
            amounts = amounts.unflatten(lead + headed, (self._count(features, name), -1))
        places = [axis + (headed is not None and axis > headed) for axis in range(len(features))]
        gone = [lead + places[axis] for axis in range(len(features)) if axis not in axes]
        gone += [] if headed is None else [lead + headed + 1]
        return amounts.sum(gone) if gone else amounts

    def numbers(self, features: Sequence[int], name: NestedKey, device: torch.device) -> Tensor:
        """The part that each value belongs to, ``[*features]``."""
        shape = self.shape(features, name)
        if self.axes is None:
            return torch.arange(prod(features), device=device).reshape((*features,))
        axes, headed = self._axes(features, name)
        numbers = torch.arange(prod(shape), device=device).reshape(shape)
        if headed is not None:
            numbers = numbers.repeat_interleave(
                features[headed] // shape[axes.index(headed)], axes.index(headed)
            )
        ones = [features[axis] if axis in axes else 1 for axis in range(len(features))]
        return numbers.reshape(ones).expand((*features,))

    def _axes(self, features: Sequence[int], name: NestedKey) -> tuple[list[int], int | None]:
        """The axes among those of the features, in their order, and that of the heads."""
        assert self.axes is not None
        found = [feature_axis(axis, features, "parts", repr(name)) for axis in self.axes]
        if len(set(found)) < len(found):
            raise IndexError(
                f"axis={self.axes} names an axis of {name!r} twice, which has {['batch', *features]}"
            )
        return sorted(found), None if self.heads is None else found[-1]

    def _count(self, features: Sequence[int], name: NestedKey) -> int:
        assert self.heads is not None
        return equal_heads(self.heads, features[self._axes(features, name)[1] or 0], repr(name))
