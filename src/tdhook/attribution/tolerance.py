"""Tolerance: more and more points on a way, until sums are as close to a difference as they are to be."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from tdhook.attribution.paths import Found, Way, along
from tdhook.passes.rows import some_rows, with_rows
from tdhook.passes.variants import Variants
from tdhook.perturbing.quadrature import quadrature

__all__ = ["require_tolerance", "until_close"]

_STRETCHES = 4
"""Those of a way before they are halved for the first time."""
_FEWEST = 2 * _STRETCHES + 1
"""The trapezoid rule twice, on the stretches and on their halves."""


def require_tolerance(tolerance: float | None, most: int, *, compiled: bool) -> None:
    """A tolerance can be reached in so many steps and seen to be, if there is one.

    Raises:
        ValueError: it is not positive, the steps are too few, or a graph would have to know how many it takes.
    """
    if tolerance is None:
        return
    if not tolerance > 0:
        raise ValueError(f"a tolerance is how far a sum may be off, a positive number, got {tolerance}")
    if most < _FEWEST:
        raise ValueError(f"a tolerance takes at least {_FEWEST} steps to be seen, got steps={most} at most")
    if compiled:
        raise ValueError(
            "how many steps a tolerance takes is seen as it goes, which no graph does: give steps"
        )


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
    count, stretches = len(rows), _STRETCHES
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
