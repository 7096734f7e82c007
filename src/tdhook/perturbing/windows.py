"""Windows that slide over a value, and soft spots on a picture."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from tensordict.utils import NestedKey
from torch import Tensor

__all__ = ["SoftGrids", "Spots", "Window", "Windows", "height_and_width", "over_channels"]

Window: TypeAlias = "int | Sequence[int]"
"""How far something reaches along the last axes of a value, one number or one for each axis."""


@dataclass(frozen=True, eq=False)
class Windows:
    """All places of a window that slides over a value.

    Attributes:
        covers: for each axis of the value, which places a window covers, ``[windows along it, size]``.
    """

    covers: tuple[Tensor, ...]

    @staticmethod
    def of(shape: Sequence[int], window: Window, strides: Window | None, key: NestedKey) -> Windows:
        """The windows over a shape; those at the far edge may be smaller.

        Args:
            shape: of one element of the batch.
            window: the size of a window along the last axes; along those before it takes in all.
            strides: how far apart windows are; by default they lie side by side.
            key: of the value, for messages.

        Raises:
            ValueError: the window does not fit, or there are gaps between windows.
        """
        sizes = (window,) if isinstance(window, int) else tuple(window)
        steps = sizes if strides is None else (strides,) if isinstance(strides, int) else tuple(strides)
        if len(steps) == 1:
            steps *= len(sizes)
        if not 0 < len(sizes) <= len(shape) or min(sizes) < 1:
            raise ValueError(
                f"a window of {list(sizes)} over {key!r}, of which one element has shape {list(shape)}: give a size of "
                "at least one for each of its last axes"
            )
        if len(steps) != len(sizes) or any(
            not 0 < step <= size for step, size in zip(steps, sizes, strict=True)
        ):
            raise ValueError(
                f"strides of {list(steps)} for windows of {list(sizes)} leave entries out, or are not one for each "
                "axis: give at least 1, and at most the size of the window"
            )
        whole = len(shape) - len(sizes)
        covers = [torch.ones(1, size, dtype=torch.bool) for size in shape[:whole]]
        for size, reach, step in zip(shape[whole:], sizes, steps, strict=True):
            count = max(0, -(-(size - reach) // step)) + 1
            begins = torch.arange(count).unsqueeze(1) * step
            places = torch.arange(size)
            covers.append((places >= begins) & (places < begins + reach))
        return Windows(tuple(covers))

    def at_each_place_of(self, others: Sequence[int]) -> Windows:
        """The same windows at each place of axes before."""
        return Windows((*(torch.eye(size, dtype=torch.bool) for size in others), *self.covers))

    @property
    def grid(self) -> torch.Size:
        """How many windows there are along each axis."""
        return torch.Size([len(cover) for cover in self.covers])

    def masks(self, numbers: range) -> Tensor:
        """Which entries are in some windows, ``[windows, *shape]``, or of size one where it is all along an axis."""
        left, found = torch.arange(numbers.start, numbers.stop), None
        for axis in reversed(range(len(self.covers))):
            cover = self.covers[axis]
            own = cover[left % len(cover)] if len(cover) > 1 else cover.all(1, keepdim=True)
            own = own.reshape(-1, *(1,) * axis, own.shape[1], *(1,) * (len(self.covers) - axis - 1))
            left = left // len(cover)
            found = own if found is None else found & own
        assert found is not None
        return found.expand(len(numbers), *found.shape[1:])

    def spread_out(self, worth: Tensor) -> Tensor:
        """What windows are worth, ``[..., windows]``, split evenly over their entries: ``[..., entries]``.

        An entry gets the mean of what it gets of the windows that cover it.
        """
        found = worth.reshape(*worth.shape[:-1], *self.grid)
        for axis, cover in enumerate(self.covers, start=worth.dim() - 1):
            share = cover.to(worth.dtype) / cover.sum(1, keepdim=True) / cover.sum(0)
            found = torch.tensordot(found, share.to(worth), dims=([axis], [0])).movedim(-1, axis)
        return found.flatten(worth.dim() - 1)


@dataclass(frozen=True)
class Spots:
    """Gaussian spots on a grid over pictures (Greydanus et al. 2018, section 3).

    Attributes:
        shape: of one element of the batch, ``[*channels, height, width]``.
        distance: between the centres of spots, in pixels.
        width: standard deviation of a spot, in pixels.
    """

    shape: tuple[int, ...]
    distance: int
    width: float

    @property
    def grid(self) -> tuple[int, int]:
        """How many spots there are along height and width."""
        height, width = self.shape[-2:]
        return -(-height // self.distance), -(-width // self.distance)

    @property
    def count(self) -> int:
        """How many spots there are."""
        return self.grid[0] * self.grid[1]

    def masks(self, number: Tensor) -> Tensor:
        """How far each pixel is in spots of these numbers, one at the centre of each: ``[spots, height, width]``.

        In double precision; what is blurred rounds them to its own.
        """
        along = []
        for place, size in zip((number // self.grid[1], number % self.grid[1]), self.shape[-2:], strict=True):
            centre = place * self.distance + (self.distance - 1) / 2
            pixels = torch.arange(size, dtype=torch.float64)
            along.append(torch.exp(-0.5 * ((pixels - centre.unsqueeze(1)) / self.width) ** 2))
        return along[0].unsqueeze(2) * along[1].unsqueeze(1)

    def spread_out(self, worth: Tensor) -> Tensor:
        """What spots are worth, ``[..., spots]``, between their centres linear: ``[..., height, width]``."""
        down, across = self.grid
        flat = worth.reshape(-1, 1, down, across)
        size = (down * self.distance, across * self.distance)
        large = F.interpolate(flat, size=size, mode="bilinear", align_corners=False)
        height, width = self.shape[-2:]
        return large[:, 0, :height, :width].reshape(*worth.shape[:-1], height, width)


class SoftGrids:
    """Random grids, enlarged to pictures and shifted (Petsiuk, Das and Saenko 2018, section 3.2).

    Args:
        others: places that have a grid each.
        size: height and width of a picture.
        count: how many masks.
        cells: along height and width.
        share: of the cells that are there.
        chance: draws them.
    """

    def __init__(
        self,
        others: Sequence[int],
        size: tuple[int, int],
        count: int,
        cells: int,
        share: float,
        chance: random.Random,
    ) -> None:
        self._others, self._size = torch.Size(others), size
        self._cell = tuple(-(-length // cells) for length in size)
        each, grid = count * self._others.numel(), cells + 1
        there = [float(chance.random() < share) for _ in range(each * grid * grid)]
        self._grids = torch.tensor(there).reshape(each, 1, grid, grid)
        self._shifts = [torch.tensor([chance.randrange(c) for _ in range(each)]) for c in self._cell]

    def masks(self, numbers: range) -> Tensor:
        """How far each pixel is there in some masks, ``[masks, *others, height, width]``."""
        per = self._others.numel()
        some = slice(numbers.start * per, numbers.stop * per)
        grids = self._grids[some]
        size = [cell * grids.shape[-1] for cell in self._cell]
        large = F.interpolate(grids, size=size, mode="bilinear", align_corners=False)[:, 0]
        rows, columns = (
            shift[some].unsqueeze(1) + torch.arange(length)
            for shift, length in zip(self._shifts, self._size, strict=True)
        )
        each = torch.arange(len(large)).reshape(-1, 1, 1)
        cut = large[each, rows.unsqueeze(2), columns.unsqueeze(1)]
        return cut.reshape(-1, *self._others, *self._size)


def height_and_width(shape: Sequence[int], key: NestedKey, who: str) -> tuple[int, int]:
    """Those of a picture.

    Raises:
        ValueError: it is none.
    """
    if len(shape) < 2:
        raise ValueError(
            f"{who} is of pictures [*channels, height, width], and one element of {key!r} has shape {list(shape)}: "
            "take Ablation or ShapleySampling, or attribute pictures alone, by attribute="
        )
    return shape[-2], shape[-1]


def over_channels(pictures: Tensor, others: int, shape: Sequence[int]) -> Tensor:
    """Masks ``[masks, *others, height, width]`` with axes for channels, ``[masks, *others, 1, .., height, width]``."""
    lead, size = pictures.shape[: 1 + others], pictures.shape[1 + others :]
    return pictures.reshape(*lead, *(1,) * (len(shape) - others - 2), *size)
