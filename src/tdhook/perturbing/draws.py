"""Draws: changed inputs that explanations are averaged over, and how their relevance is brought back.

Whatever has ``samples``, ``stays``, ``changed`` and ``undone`` as here is one: a transform of a user's own that can be
undone.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping
from typing import Protocol, TypeAlias

import torch
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor

__all__ = ["Draws", "Flips", "Noise", "Scale", "Shifts"]

Scale: TypeAlias = "float | Tensor | Mapping[NestedKey, float | Tensor]"
"""A number for each entry of an input: one for all, or a tensor of the shape of one element; or these by key."""

_STEP = -7046029254386353131
_MIXING = ((30, -4658895280553007687), (27, -7723592293110705685), (31, 1))
"""Factors of 64 bits, as numbers with a sign."""


class Draws(Protocol):
    """Changed inputs, by number."""

    @property
    def samples(self) -> int:
        """How many there are."""

    @property
    def stays(self) -> bool:
        """Whether everything stays where it was, inside the model too, so that nothing has to be undone there.

        Where it does not, what an input is compared with is changed as the input is.
        """

    def changed(self, key: NestedKey, value: Tensor, dims: int, numbers: range) -> Tensor:
        """An input changed: ``[*batch, *shape]``, with ``dims`` batch axes, to ``[numbers, *batch, *shape]``."""

    def undone(self, key: NestedKey, relevance: Tensor, dims: int, numbers: range) -> Tensor:
        """Relevance of the changed input as that of the input; ``dims`` counts the axes before those of the input."""


class Noise:
    """Normal noise, the same for all elements of a batch, so that none depends on the others (Smilkov et al. 2017).

    Args:
        scale: its standard deviation, in units of the input. The features of an observation often have scales of their
            own, so that a tensor does them more justice: ``0.1 * td["observation"].std(0)``.
        samples: how many are drawn.
        relative: whether ``scale`` is a share of the range of each element (its largest value less its smallest), as in
            the paper.
        seed: of the noise.

    Raises:
        ValueError: the scale is negative, or there are no samples.
    """

    stays = True

    def __init__(self, scale: Scale, samples: int = 32, *, relative: bool = False, seed: int = 0) -> None:
        _require_samples(samples)
        named = scale if isinstance(scale, Mapping) else {"": scale}
        if not all(bool((torch.as_tensor(one) >= 0).all()) for one in named.values()):
            raise ValueError("the scale of noise is a standard deviation, which is not negative")
        self.scale, self.samples, self.relative, self.seed = scale, samples, relative, seed

    def changed(self, key: NestedKey, value: Tensor, dims: int, numbers: range) -> Tensor:
        """``value`` with noise; an input that no scale is given for stays as it is."""
        named = (
            {unravel_key(k): v for k, v in self.scale.items()} if isinstance(self.scale, Mapping) else None
        )
        given = self.scale if named is None else named.get(unravel_key(key), 0.0)
        scale = torch.as_tensor(given, dtype=value.dtype, device=value.device)
        shape = value.shape[dims:]
        try:
            scale = scale.expand(shape)
        except RuntimeError:
            raise ValueError(
                f"the scale of noise for {key!r} has shape {list(scale.shape)}; one element of the batch has "
                f"{list(shape)}"
            ) from None
        noise = _normal(shape, f"{self.seed} {key}", numbers, value).mul_(scale)
        noise = noise.reshape(len(numbers), *(1,) * dims, *shape)
        if self.relative and shape.numel():
            flat = value.reshape(*value.shape[:dims], -1)
            noise = noise * (flat.amax(-1) - flat.amin(-1)).reshape((*value.shape[:dims], *(1,) * len(shape)))
        return value + noise

    def undone(self, key: NestedKey, relevance: Tensor, dims: int, numbers: range) -> Tensor:
        """Noise moves nothing."""
        return relevance


class Flips:
    """A picture, and what is seen of it in mirrors: along each of some axes, and along several of them.

    Args:
        *axes: of one element, counted from the end: ``-1`` is left and right of ``[*channels, height, width]``. Inputs
            that have no such axis stay as they are.

    Raises:
        ValueError: no axis is given, or one that is not counted from the end.
    """

    stays = False

    def __init__(self, *axes: int) -> None:
        if not axes or max(axes) >= 0:
            raise ValueError(f"flips are along axes counted from the end, like -1, got {axes}")
        chosen = [itertools.combinations(axes, count) for count in range(len(axes) + 1)]
        self._each = list(itertools.chain.from_iterable(chosen))

    def __repr__(self) -> str:
        return f"Flips({', '.join(str(each[0]) for each in self._each if len(each) == 1)})"

    @property
    def samples(self) -> int:
        """Two for one axis, four for two."""
        return len(self._each)

    def changed(self, key: NestedKey, value: Tensor, dims: int, numbers: range) -> Tensor:
        """``value`` in the mirrors."""
        return torch.stack([self._flipped(value, dims, i) for i in numbers])

    def undone(self, key: NestedKey, relevance: Tensor, dims: int, numbers: range) -> Tensor:
        """In the same mirror again."""
        return torch.stack([self._flipped(x, dims - 1, i) for x, i in zip(relevance, numbers, strict=True)])

    def _flipped(self, x: Tensor, dims: int, number: int) -> Tensor:
        there = [axis for axis in self._each[number] if x.dim() - dims >= -axis]
        return x.flip(there) if there else x


class Shifts:
    """A picture moved by up to so many pixels in either direction; what leaves at an edge comes in at the other.

    Args:
        most: how many pixels.
        axes: of one element, counted from the end. Inputs that lack one stay as they are.

    Raises:
        ValueError: ``most`` is negative, or an axis is not counted from the end.
    """

    stays = False

    def __init__(self, most: int, axes: tuple[int, ...] = (-2, -1)) -> None:
        if most < 0 or not axes or max(axes) >= 0:
            raise ValueError(
                f"shifts are by pixels, along axes counted from the end, got most={most}, axes={axes}"
            )
        self._axes = axes
        self._each = list(itertools.product(range(-most, most + 1), repeat=len(axes)))

    def __repr__(self) -> str:
        return f"Shifts({self._each[-1][0]}, axes={self._axes})"

    @property
    def samples(self) -> int:
        """``(2 most + 1)`` to the power of the number of axes."""
        return len(self._each)

    def changed(self, key: NestedKey, value: Tensor, dims: int, numbers: range) -> Tensor:
        """``value``, moved."""
        return torch.stack([self._moved(value, dims, self._each[i]) for i in numbers])

    def undone(self, key: NestedKey, relevance: Tensor, dims: int, numbers: range) -> Tensor:
        """Moved back."""
        back = [tuple(-step for step in self._each[i]) for i in numbers]
        return torch.stack([self._moved(x, dims - 1, step) for x, step in zip(relevance, back, strict=True)])

    def _moved(self, x: Tensor, dims: int, steps: tuple[int, ...]) -> Tensor:
        return x.roll(steps, self._axes) if x.dim() - dims >= -min(self._axes) else x


def _require_samples(samples: int) -> None:
    if type(samples) is not int or samples < 1:
        raise ValueError(f"samples is how many are drawn, at least one, got {samples!r}")


def _normal(shape: torch.Size, seed: str, numbers: range, like: Tensor) -> Tensor:
    """Normal numbers ``[numbers, *shape]``, by arithmetic alone, so that a compiled graph draws the same in each call.

    A counter is mixed (Steele, Lea and Flood 2014), and each two uniform numbers are made normal (Box and Muller 1958).
    """
    start = random.Random(seed).randrange(2**62)
    starts = _mixed(torch.arange(numbers.start, numbers.stop, device=like.device) * _STEP + start)
    at = torch.arange((shape.numel() + 1) // 2, device=like.device) * _STEP
    x = _mixed(starts.unsqueeze(1) + at)
    radius = ((x >> 8) & 0xFFFFFF).to(torch.float32).add_(0.5).div_(2**24).log_().mul_(-2).sqrt_()
    angle = (x >> 40).bitwise_and_(0xFFFFFF).to(torch.float32).mul_(2 * math.pi / 2**24)
    pair = torch.cat([angle.cos().mul_(radius), angle.sin_().mul_(radius)], 1)
    return pair[:, : shape.numel()].reshape(len(numbers), *shape).to(like.dtype)


def _mixed(x: Tensor) -> Tensor:
    """Numbers of 64 bits that look like chance, in the place of others."""
    for shift, factor in _MIXING:
        x.bitwise_xor_((x >> shift).bitwise_and_((1 << (64 - shift)) - 1)).mul_(factor)
    return x
