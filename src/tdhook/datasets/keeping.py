"""Keeping: what of each row's relevance is written to disk, and how exactly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor

from tdhook.keys import parts_of

__all__ = ["Kept", "as_kept", "block_sums"]

_DTYPES = (torch.bfloat16, torch.float32, torch.float64)


class Kept:
    """What is kept of each row.

    Relevance is summed, so that what is kept is still all of it: over axes, over blocks of pixels, or over regions.

    Args:
        keys: the inputs whose relevance is kept; by default all. What is no relevance (a ledger) is always kept.
        dtype: how exactly: ``torch.bfloat16``, ``float32`` or ``float64``; by default as it was found.
        summed: axes of the features that are summed over, ``-1`` the last: ``(-2, -1)`` leaves one value per channel.
        pooled: the side of square blocks of the last two axes, each of which becomes the sum of its pixels; blocks at
            the edges may be smaller.
        regions: masks by name, each of which expands to the features: in the place of the features there is one value
            per region, in the order of the names.
        compressed: whether rows are written in compressed blocks, without their zeros, instead of a memory-mapped
            TensorDict; they are decompressed as they are read.

    Shapes:
        Relevance ``[rows, *features]`` is kept as ``[rows, *what is left]``, or ``[rows, regions]``.

    Raises:
        TypeError: a region holds something else than truth values, or ones and zeros.
        ValueError: the dtype is none of these (``float16`` has no room for small relevance: it would be zero), or
            more than one of ``summed``, ``pooled`` and ``regions`` is given.
    """

    def __init__(
        self,
        *,
        keys: Sequence[NestedKey] | None = None,
        dtype: torch.dtype | None = None,
        summed: Sequence[int] = (),
        pooled: int | None = None,
        regions: Mapping[str, Tensor] | None = None,
        compressed: bool = False,
    ) -> None:
        if dtype not in (None, *_DTYPES):
            why = ": small relevance would be zero in it" if dtype is torch.float16 else ""
            raise ValueError(f"relevance is kept in bfloat16, float32 or float64, not in {dtype}{why}")
        if sum(map(bool, (summed, pooled, regions))) > 1:
            raise ValueError("relevance is summed over axes, over blocks or over regions: give one of these")
        if pooled is not None and pooled < 1:
            raise ValueError(f"blocks have a side of at least one pixel, got pooled={pooled}")
        self.keys = None if keys is None else tuple(map(unravel_key, keys))
        self.dtype, self.summed, self.pooled, self.compressed = dtype, tuple(summed), pooled, compressed
        self.regions = {name: _mask(name, mask) for name, mask in (regions or {}).items()}

    def of(
        self,
        entries: Mapping[NestedKey, Tensor],
        relevance: Mapping[NestedKey, NestedKey],
        axes: Mapping[NestedKey, int],
    ) -> dict[NestedKey, Tensor]:
        """What is kept of some rows.

        Args:
            entries: all that was found, ``[rows, ...]`` by key.
            relevance: those of them that are relevance, with the input that it is of.
            axes: of these, how many axes are before those of the features.
        """
        wanted = None if self.keys is None else set(self.keys)
        if wanted is not None and wanted - set(relevance.values()):
            missing = ", ".join(map(repr, sorted(wanted - set(relevance.values()), key=parts_of)))
            raise KeyError(
                f"keep= names {missing}; there is relevance of {', '.join(map(repr, relevance.values()))}"
            )
        found = {}
        for key, value in entries.items():
            if key in relevance:
                if wanted is not None and relevance[key] not in wanted:
                    continue
                value = self._reduced(value, axes[key], relevance[key])
            exact = self.dtype is None or not value.is_floating_point()
            found[key] = value if exact else value.to(self.dtype)
        return found

    def _reduced(self, value: Tensor, axes: int, key: NestedKey) -> Tensor:
        features = value.dim() - axes
        if self.summed:
            if not all(-features <= axis < features for axis in self.summed):
                raise ValueError(f"{key!r} has {features} axes of features, and summed={self.summed}")
            return value.sum([axis if axis < 0 else axis + axes for axis in self.summed])
        if self.pooled is not None:
            if features < 2:
                raise ValueError(f"pooled= sums blocks of the last two axes, and {key!r} has {features}")
            return block_sums(value, self.pooled)
        if self.regions:
            return torch.stack([self._in_region(value, name, axes, key) for name in self.regions], -1)
        return value

    def _in_region(self, value: Tensor, name: str, axes: int, key: NestedKey) -> Tensor:
        mask = self.regions[name]
        try:
            fitting = mask.to(value.device).expand(value.shape[axes:])
        except RuntimeError:
            raise ValueError(
                f"the region {name!r} of shape {tuple(mask.shape)} does not fit {key!r}, whose features have the shape "
                f"{tuple(value.shape[axes:])}"
            ) from None
        return (value * fitting).flatten(axes).sum(-1)


def _mask(name: str, mask: Tensor) -> Tensor:
    there = mask.bool()
    if bool((there != mask).any()):
        raise TypeError(
            f"the region {name!r} has other values than 0 and 1: a mask says what is in it, and weighs nothing"
        )
    return there


def block_sums(value: Tensor, side: int) -> Tensor:
    """Sums of blocks, ``[..., ceil(height / side), ceil(width / side)]``."""
    height, width = value.shape[-2:]
    padded = F.pad(value, (0, -width % side, 0, -height % side))
    blocks = padded.unflatten(-1, (-1, side)).unflatten(-3, (-1, side))
    found: Tensor = blocks.sum((-3, -1))
    return found


def as_kept(keep: Kept | torch.dtype | str | None) -> Kept | None:
    """What is kept: all, a dtype of all, or nothing.

    Raises:
        ValueError: it is none of these.
    """
    if keep is None or isinstance(keep, Kept):
        return keep
    if isinstance(keep, torch.dtype):
        return Kept(dtype=keep)
    if keep == "all":
        return Kept()
    if keep == "compressed":
        return Kept(compressed=True)
    raise ValueError(f"keep={keep!r} is neither 'all', 'compressed', a dtype, a Kept(...) nor None")
