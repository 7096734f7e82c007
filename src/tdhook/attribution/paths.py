"""Paths: gradients on the way from references to the input."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook.contexts.compared import Compared
from tdhook.passes.forward import Run
from tdhook.passes.rows import some_rows, with_rows
from tdhook.passes.variants import Change, Variants
from tdhook.perturbing.quadrature import quadrature
from tdhook.tape.axes import beside

__all__ = ["Way", "along", "until_close", "ways", "weighed"]

Found = dict[NestedKey, Tensor]
_FIRST = 4
"""The stretches of a way before they are halved for the first time."""


class Way:
    """Straight ways from references to the input.

    Args:
        starts: the references by source, ``[references, *source]``: one for all points, or one for each.
        ends: the input by source.
    """

    def __init__(self, starts: Mapping[NestedKey, Tensor], ends: Mapping[NestedKey, Tensor]) -> None:
        self.starts, self.ends = starts, ends

    def points(self, places: Sequence[float]) -> Found:
        """Points so far along, ``[points, *source]`` by source."""
        found = {}
        for key, x in self.ends.items():
            place = torch.tensor(places, dtype=x.dtype, device=x.device)
            found[key] = torch.lerp(self.starts[key], x, beside(place, x.unsqueeze(0)))
        return found

    def at(self, places: Sequence[float]) -> Change:
        """The variants that lie so far along."""
        return lambda numbers: self.points(places[numbers.start : numbers.stop])

    def shares(self, gradients: Mapping[NestedKey, Tensor]) -> Found:
        """The way times gradients ``[points, *source]`` or ``[points, outputs, *source]``, of the same shape."""
        found = {}
        for key, grad in gradients.items():
            way = self.ends[key] - self.starts[key]
            found[key] = (way.unsqueeze(1) if grad.dim() > way.dim() else way) * grad
        return found

    def among(self, rows: Tensor, count: int) -> Way:
        """The ways of some of ``count`` elements along the first batch axis."""
        ends = {key: some_rows(x, count, rows) for key, x in self.ends.items()}
        return Way({key: some_rows(x, count, rows, 1) for key, x in self.starts.items()}, ends)


def ways(method: Compared, run: Run, ends: Mapping[NestedKey, Tensor]) -> Iterator[Way]:
    """The way from each of the references of a method, one after the other."""
    for number in range(method.samples):
        yield Way(method.starts(run, ends, range(number, number + 1)), ends)


def along(variants: Variants, way: Way, places: Sequence[tuple[float, float]]) -> Found:
    """The way from one reference times a weighted sum of gradients on it.

    Args:
        variants: asks the model.
        way: where to.
        places: how far along, and with what weight.

    Returns:
        By source, ``[*source]`` or ``[outputs, *source]``.
    """
    summed = weighed(variants, way, places)
    return {key: (way.ends[key] - way.starts[key][0]) * grad for key, grad in summed.items()}


def weighed(
    variants: Variants,
    way: Way,
    places: Sequence[tuple[float, float]],
    of: Iterable[NestedKey] | None = None,
) -> Found:
    """A weighted sum of gradients on the way from one reference, by source as :func:`along` gives them.

    Args:
        variants: asks the model.
        way: where to.
        places: how far along, and with what weight.
        of: the sources whose gradients are wanted; by default those that go the way.
    """
    far, weights = zip(*places, strict=True)
    return variants.summed(weights, way.at(far), list(way.ends) if of is None else of)


def until_close(
    variants: Variants, way: Way, rise: Tensor, tolerance: float, most: int, joint: tuple[int, ...] = ()
) -> Found:
    """Sums of shares on the way from one reference, of more and more points until they are close to the difference.

    The trapezoid rule, each time with as many points again between those before; or Simpson's, where it is closer.

    Args:
        variants: asks the model.
        way: where to.
        rise: the difference of the target, ``[*batch]`` or ``[outputs, *batch]``.
        tolerance: how close, in units of the target.
        most: how many points there are at most.
        joint: batch axes along which elements depend on each other, so that only their sums are to be close.

    Returns:
        By source, ``[*source]`` or ``[outputs, *source]``.
    """
    after = variants.several
    axes = tuple(after + axis for axis in joint)
    rows = torch.arange(rise.shape[after] if rise.dim() > after else 1, device=rise.device)
    count, stretches = len(rows), _FIRST
    before = along(variants, way, quadrature("trapezoid", stretches + 1))
    found: Found = {}
    far = torch.ones_like(rise, dtype=torch.bool)
    while True:
        between = along(variants, way, quadrature("middle", stretches))
        now = {key: (before[key] + between[key]) / 2 for key in before}
        stretches *= 2
        closest, gap = _closest(now, {key: now[key].lerp(before[key], -1 / 3) for key in now}, rise, axes)
        for key, value in closest.items():
            if key in found:  # what was close stays as it was, whatever others need
                kept = some_rows(found[key], count, rows, after) if rise.dim() > after else found[key]
                value = _where(far, value, kept)
                found[key] = with_rows(found[key], count, rows, value, after) if rise.dim() > after else value
            else:
                found[key] = value
        far &= gap > tolerance
        first = far.movedim(after, 0) if rise.dim() > after else far
        left = first.reshape(len(rows), -1).any(1).nonzero().squeeze(1)
        if not len(left):
            return found
        if 2 * stretches + 1 > most:
            warnings.warn(
                f"integrated gradients of {len(left)} of {count} elements of the batch are {gap[far].amax():.2g} off "
                f"after {stretches + 1} steps, which is more than tolerance={tolerance}: give more steps, or a larger "
                "tolerance",
                stacklevel=2,
            )
            return found
        before = now
        some = variants.among(left) if len(left) < len(rows) and after not in axes else None
        if some is not None:
            before = {key: some_rows(value, len(rows), left, after) for key, value in now.items()}
            way, variants, rise = way.among(left, len(rows)), some, rise.index_select(after, left)
            rows, far = rows[left], far.index_select(after, left)


def _closest(one: Found, other: Found, rise: Tensor, axes: tuple[int, ...]) -> tuple[Found, Tensor]:
    """Of two sums, for each element that which comes closer to a difference; and how far it is off."""
    gaps = []
    for sums in (one, other):
        gap = rise - sum(value.reshape(*rise.shape, -1).sum(-1) for value in sums.values())
        gaps.append((gap.sum(axes, keepdim=True).expand_as(gap) if axes else gap).abs())
    first = gaps[0] <= gaps[1]
    return {key: _where(first, value, other[key]) for key, value in one.items()}, torch.minimum(*gaps)


def _where(which: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """Of two values, ``[*which, ...]`` but for how the axes of the batch lie, the one where it is so."""
    shape = (*which.shape, -1)
    return torch.where(which.unsqueeze(-1), one.reshape(shape), other.reshape(shape)).reshape(one.shape)
