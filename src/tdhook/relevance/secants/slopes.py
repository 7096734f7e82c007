"""Slopes: functions of one value at each place, and choices between two."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from tdhook.conventions import per_value
from tdhook.relevance.secants.averages import average, product
from tdhook.relevance.secants.pair import Grads, Pair, pull_back, wide
from tdhook.tape.functions import may_look_at_once, seen_finite

__all__ = ["choice", "filled", "quotient", "rounded", "scaled", "slope", "slopes"]


def slopes(pair: Pair, grads: Sequence[Tensor]) -> Grads:
    """Of a function that is applied to each value: the slope of the secant (Shrikumar et al. 2017, eq. 10)."""
    if len(pair.live) != 1 or pair.ends[0].shape != pair.outputs[0].shape or pair.ends[0].is_complex():
        return average(pair, grads)
    (x,), (start,) = pair.ends, pair.starts
    return (
        grads[0] * slope(pair.name, lambda at: pair.run([at])[0], x, start, pair.outputs[0], pair.before[0]),
    )


def scaled(pair: Pair, grads: Sequence[Tensor]) -> Grads:
    """Of sums and products of one value that is attributed with something else.

    If that is another on the reference, as masks are that were made of the inputs, or copies off the tape, it is so
    because of the inputs: the value that is attributed takes all, by the slope of the secant.
    """
    alone = len(pair.live) == 1 and pair.ends[0].shape == pair.outputs[0].shape
    if not alone or not pair.differs or pair.ends[0].is_complex():
        return product(pair, grads)
    step, rise = pair.steps[0], pair.rises[0]
    return (grads[0] * per_value(step, rise),)


def quotient(pair: Pair, grads: Sequence[Tensor]) -> Grads:
    """``a / b - a0 / b0 = (a - a0) (1/b + 1/b0) / 2 - (b - b0) (a + a0) / (2 b b0)``.

    Where one of the denominators is next to nothing beside the other (what a norm of zero is clamped to), the two terms
    are large and cancel. There it is the integral on the way, ``(a - a0) log(b / b0) / (b - b0)`` and what is left.
    """
    numerator, denominator = pair.argument(0, "input"), pair.argument(1, "other")
    both = [x for x in (numerator, denominator) if any(x is end for end in pair.ends)]
    if pair.argument(2, "rounding_mode") is not None:
        return rounded(pair, grads)
    if len(both) < 2:
        alone = len(both) == 1 and both[0] is numerator
        return scaled(pair, grads) if alone else average(pair, grads)
    (a, b), (a0, b0), (g,) = (tuple(map(wide, values)) for values in (pair.ends, pair.starts, grads))
    of_a, of_b = (1 / b + 1 / b0) / 2, -(a + a0) / 2 / b / b0
    if not g.is_complex():
        ratio = b / b0
        apart = (ratio > _APART) | ((ratio > 0) & (ratio < 1 / _APART))
        if not may_look_at_once(apart) or bool(apart.any()):
            db = torch.where(apart, b - b0, 1.0)
            on_the_way = torch.where(apart, ratio, 1.0).log() / db
            of_a = torch.where(apart, on_the_way, of_a)
            of_b = torch.where(apart, (a / b - a0 / b0 - (a - a0) * on_the_way) / db, of_b)
    shares = (g * of_a, g * of_b)
    return tuple(share.sum_to_size(x.shape).to(x.dtype) for share, x in zip(shares, pair.ends, strict=True))


_APART = 1e6
"""From where on single precision tells nothing of what two terms of that size sum to."""


def rounded(pair: Pair, grads: Sequence[Tensor]) -> Grads:
    """Of a quotient that is rounded, ``n = floor(a / b)`` or ``trunc(a / b)``, and of what it leaves, ``a - n b``.

    The steps of ``n`` are those of the quotient, in proportion, which is shared as any quotient.
    """
    if len(pair.live) == 1 and pair.ends[0].shape == pair.outputs[0].shape:
        return slopes(pair, grads)
    (g,) = grads
    (a, a0, _), (b, b0, _) = values = [_both(pair, i, name, g) for i, name in enumerate(("input", "other"))]
    z, z0 = pair.outputs[0], pair.before[0]
    leaves = pair.name in ("remainder", "fmod")
    n, n0 = ((a - z) / b, (a0 - z0) / b0) if leaves else (z, z0)
    steep = per_value(a / b - a0 / b0, n - n0)
    shares = [steep * (1 / b + 1 / b0) / 2, -steep * (a + a0) / (2 * b * b0)]
    if leaves:
        middle = (b + b0) / 2
        shares = [1 - middle * shares[0], -(n + n0) / 2 - middle * shares[1]]
    return _given_to(pair, g, shares, [index for _, _, index in values])


def _given_to(pair: Pair, g: Tensor, shares: Sequence[Tensor], indices: Sequence[int | None]) -> Grads:
    """What each leaf that is attributed gets of a gradient, by the shares of arguments."""
    found: dict[int, Tensor] = {}
    for share, index in zip(shares, indices, strict=True):
        if index is not None:
            amount = g * share
            if not seen_finite(amount):
                amount = torch.where(share == 0, 0.0, amount)
            summed = amount.expand(pair.outputs[0].shape).sum_to_size(pair.shape_of(index))
            found[index] = found[index] + summed if index in found else summed
    return tuple(found.get(i) for i in pair.live)


def slope(
    name: str, function: Callable[[Tensor], Tensor], x: Tensor, start: Tensor, z: Tensor, before: Tensor
) -> Tensor:
    """``(f(x) - f(s)) / (x - s)``, and the derivative half way where that is as exact.

    The quotient of two small differences is rounded so that the derivative, which agrees with it within that, is the
    better value.

    Args:
        name: that of the function.
        function: applied to each value.
        x: ``[*shape]``.
        start: likewise, on the reference.
        z: ``f(x)``.
        before: ``f(start)``.
    """
    # In place where it can be: as many new tensors would take longer than what is computed.
    step = x - start
    if name in _RELU:  # how much of the way lies above zero
        near = torch.maximum(x, start).div_(step.abs_()).clamp_min_(0.0).clamp_max_(1.0)
    else:
        ratio = (z - before).div_(step)
        middle = _derivative(name, function, x / 2 + start / 2)
        far = torch.maximum(x.abs(), start.abs())
        # What functions compute on their way is of the size of their argument, up to one.
        size = torch.maximum(z.abs(), before.abs()).add_(middle.abs().mul_(far)).add_(far.clamp(max=1.0))
        noise = size.mul_(8 * torch.finfo(x.dtype).eps).div_(step.abs())
        near = torch.where((step == 0) | ((ratio - middle).abs_() <= noise), middle, ratio)
    # Where both are infinite, as masks are, nothing is different.
    return near.nan_to_num_(0.0, 0.0, 0.0)


_RELU = frozenset(("relu", "ReLU"))


_BY_VALUE: Mapping[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": lambda z: (1 - z) * z,
    "tanh": lambda z: 1 - z * z,
}
"""Derivatives that the value of the function tells."""


def _derivative(name: str, function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    by_value = None if at.is_complex() else _BY_VALUE.get(name.lower())
    if by_value is not None:
        return by_value(function(at))
    found = pull_back(lambda x: (function(x),), [at], [torch.ones_like(at)])[0]
    return torch.zeros_like(at) if found is None else found


def choice(pair: Pair, grads: Sequence[Tensor]) -> Grads:
    """Of ``where(condition, a, b)``, or ``a.where(condition, b)``."""
    condition, at = pair.argument(0, "condition"), (1, 2)
    if condition.dtype != torch.bool:
        condition, at = pair.argument(1, "condition"), (0, 2)
    index = next(i for i, value in enumerate(pair.leaves) if value is condition)
    return _chosen(pair, grads, condition, pair.beside.get(index, condition), "input", "other", at)


def filled(pair: Pair, grads: Sequence[Tensor]) -> Grads:
    """Of ``masked_fill(a, mask, value)``."""
    mask = pair.argument(1, "mask")
    index = next(i for i, value in enumerate(pair.leaves) if value is mask)
    now, before = ~mask, pair.beside.get(index)
    return _chosen(pair, grads, now, now if before is None else ~before, "input", "value", (0, 2))


def _chosen(
    pair: Pair,
    grads: Sequence[Tensor],
    now: Tensor,
    before: Tensor,
    first: str,
    second: str,
    at: tuple[int, int],
) -> Grads:
    """The way goes along one of the two, and where the choice is another on the reference along both."""
    (g,) = grads
    values = [_both(pair, i, name, g) for i, name in zip(at, (first, second), strict=True)]
    shares = [now.to(g.dtype), (~now).to(g.dtype)]
    if not _is_same(now, before):
        steps = [value - start for value, start, _ in values]
        apart = values[1][1] - values[0][1]
        flips = now != before
        shares = [
            torch.where(flips, turning, share)
            for turning, share in zip(_turning(now, steps, apart, pair.rises[0]), shares, strict=True)
        ]
    return _given_to(pair, g, shares, [index for _, _, index in values])


def _is_same(now: Tensor, before: Tensor) -> bool:
    """Whether a choice is seen to be the same."""
    return now is before or (may_look_at_once(now) and torch.equal(now, before))


def _turning(now: Tensor, steps: Sequence[Tensor], apart: Tensor, rise: Tensor) -> tuple[Tensor, Tensor]:
    """What of its way each of the two counts where the choice turns from one to the other.

    It turns where they meet. Where they do not, the jump is shared in proportion.

    Args:
        now: whether the first is chosen at the end.
        steps: how far each goes.
        apart: how far the second is from the first on the reference.
        rise: of what is chosen.
    """
    # Along what is no number on one of its ends nothing can be followed: the other one takes the jump.
    known = steps[0].isfinite() & steps[1].isfinite()
    da, db = (torch.where(d.isfinite(), d, 0.0) for d in steps)
    # How much of its way each has gone where the other one takes over.
    meets = apart / (da - db)
    jump = per_value(da.square() + db.square(), rise)
    fits = known & (meets >= 0) & (meets <= 1)
    return (
        torch.where(fits, torch.where(now, 1 - meets, meets), jump * da),
        torch.where(fits, torch.where(now, meets, 1 - meets), jump * db),
    )


def _both(pair: Pair, index: int, name: str, like: Tensor) -> tuple[Tensor, Tensor, int | None]:
    """An argument, what it is on the reference, and which leaf it is if it is attributed."""
    value = pair.argument(index, name)
    if not isinstance(value, Tensor):
        constant = torch.as_tensor(value, dtype=like.dtype, device=like.device)
        return constant, constant, None
    for position, i in enumerate(pair.live):
        if pair.ends[position] is value:
            return value, pair.starts[position], i
    place = next(i for i, leaf_ in enumerate(pair.leaves) if leaf_ is value)
    return value.to(like.dtype), pair.beside.get(place, value).to(like.dtype), None
