"""Paths: gradients on the way from references to the input."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence

import torch
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook.passes.rows import beside, some_rows, with_rows
from tdhook.passes.variants import Answer, Variants
from tdhook.perturbing.quadrature import quadrature

__all__ = ["Way", "along", "until_close"]

Found = dict[NestedKey, Tensor]
_FIRST = 4
"""The stretches of a way before they are halved for the first time."""


class Way:
    """Straight ways from references to the input.

    Args:
        starts: the references, by source: one for all points, or one for each.
        ends: the input, by source.
    """

    def __init__(
        self, starts: Sequence[Mapping[NestedKey, Tensor]], ends: Mapping[NestedKey, Tensor]
    ) -> None:
        self.ends = ends
        self._starts = {key: torch.stack([one[key] for one in starts]) for key in ends}

    def points(self, numbers: range, places: Sequence[float]) -> Found:
        """Points so far along, ``[points, *source]`` by source."""
        found = {}
        for key, x in self.ends.items():
            place = torch.tensor(places, dtype=x.dtype, device=x.device).reshape(-1, *(1,) * x.dim())
            found[key] = torch.lerp(self._of(key, numbers), x, place)
        return found

    def shares(self, answer: Answer) -> Found:
        """The way times the gradient there, ``[points, *source]`` or ``[points, outputs, *source]``."""
        found = {}
        for key, grad in answer.found.items():
            way = self.ends[key] - self._of(key, answer.numbers)
            found[key] = (way.unsqueeze(1) if grad.dim() > way.dim() else way) * grad
        return found

    def among(self, rows: Tensor, count: int) -> Way:
        """The ways of some of ``count`` elements along the first batch axis."""
        some = copy.copy(self)
        some.ends = {key: some_rows(x, count, rows) for key, x in self.ends.items()}
        some._starts = {
            key: torch.stack([some_rows(one, count, rows) for one in x]) for key, x in self._starts.items()
        }
        return some

    def _of(self, key: NestedKey, numbers: range) -> Tensor:
        starts = self._starts[key]
        return starts if len(starts) == 1 else starts[numbers.start : numbers.stop]


def along(variants: Variants, way: Way, places: Sequence[tuple[float, float]]) -> Found:
    """A weighted sum of shares on the way from one reference.

    Args:
        variants: asks the model.
        way: where to.
        places: how far along, and with what weight.

    Returns:
        By source, ``[*source]`` or ``[outputs, *source]``.
    """
    found: Found = {}
    far, weights = zip(*places, strict=True)
    for answer in variants.gradients(
        len(places), lambda numbers: way.points(numbers, far[numbers.start : numbers.stop])
    ):
        some = weights[answer.numbers.start : answer.numbers.stop]
        for key, share in way.shares(answer).items():
            weight = torch.tensor(some, dtype=share.dtype, device=share.device)
            total = share.mul_(beside(weight, share)).sum(0)
            found[key] = found[key] + total if key in found else total
    return found


def until_close(variants: Variants, way: Way, rise: Tensor, tolerance: float, most: int) -> Found:
    """Sums of shares on the way from one reference, of more and more points until they are close to the difference.

    The trapezoid rule, each time with as many points again between those before; or Simpson's, where it is closer.

    Args:
        variants: asks the model.
        way: where to.
        rise: the difference of the target, ``[*batch]`` or ``[outputs, *batch]``.
        tolerance: how close, in units of the target.
        most: how many points there are at most.

    Returns:
        By source, ``[*source]`` or ``[outputs, *source]``.
    """
    after = variants.several
    rows = torch.arange(rise.shape[after] if rise.dim() > after else 1, device=rise.device)
    count, stretches = len(rows), _FIRST
    before = along(variants, way, quadrature("trapezoid", stretches + 1))
    found: Found = {}
    while True:
        between = along(variants, way, quadrature("middle", stretches))
        now = {key: (before[key] + between[key]) / 2 for key in before}
        stretches *= 2
        closest, gap = _closest(now, {key: now[key].lerp(before[key], -1 / 3) for key in now}, rise)
        for key, value in closest.items():
            found[key] = with_rows(found[key], count, rows, value, after) if key in found else value
        far = (gap > tolerance).movedim(after, 0) if rise.dim() > after else gap > tolerance
        left = far.reshape(len(rows), -1).any(1).nonzero().squeeze(1)
        if not len(left):
            return found
        if 2 * stretches >= most:
            warnings.warn(
                f"integrated gradients of {len(left)} of {count} elements of the batch are {gap.amax():.2g} off after "
                f"{stretches + 1} steps, which is more than tolerance={tolerance}: give more steps, or a larger "
                "tolerance",
                stacklevel=2,
            )
            return found
        before = now
        some = variants.among(left) if len(left) < len(rows) else None
        if some is not None:
            before = {key: some_rows(value, len(rows), left, after) for key, value in now.items()}
            way, variants, rise = way.among(left, len(rows)), some, rise.index_select(after, left)
            rows = rows[left]


def _closest(one: Found, other: Found, rise: Tensor) -> tuple[Found, Tensor]:
    """Of two sums, for each element that which comes closer to a difference; and how far it is off."""
    gaps = [
        (rise - sum(value.reshape(*rise.shape, -1).sum(-1) for value in sums.values())).abs()
        for sums in (one, other)
    ]
    first = (gaps[0] <= gaps[1]).unsqueeze(-1)
    chosen = {}
    for key, value in one.items():
        shape = (*rise.shape, -1)
        chosen[key] = torch.where(first, value.reshape(shape), other[key].reshape(shape)).reshape(value.shape)
    return chosen, torch.minimum(*gaps)
