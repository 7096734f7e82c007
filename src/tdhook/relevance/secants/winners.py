"""Winners: functions that pick values, such as maxima and what is sorted."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tdhook.relevance.secants.pair import Grads, Pair
from tdhook.tape.conditions import holds
from tdhook.tape.dependence import leaf
from tdhook.tape.functions import may_ask_of
from tdhook.tape.internals import transformed
from tdhook.tape.own import OwnTape

__all__ = ["picked_of", "winner"]

_PIECES = (1, 4, 16, 64, 256)
# In so many pieces, what does not cross once is shared in proportion, if anything there moves.
_ENOUGH = 16


def winner(pair: Pair, grads: Sequence[Tensor]) -> Grads:
    """The way is followed from one winner to the other: each counts for the part on which it wins.

    Two that cross once share exactly. Where more of them win in turn, the way is cut into pieces.
    """
    if pair.chosen:
        return pair.pull(1.0, grads)[0]
    asks = may_ask_of(*pair.ends, *pair.starts)
    found: Grads = ()
    for count in _PIECES if asks and not torch.compiler.is_compiling() else _PIECES[:1]:
        found, exact, whole = _along(pair, grads, count)
        if asks and (holds(exact) or (count >= _ENOUGH and holds(whole))):
            break
    return found


def _along(pair: Pair, grads: Sequence[Tensor], count: int) -> tuple[Grads, Tensor, Tensor]:
    total: list[Tensor | None] = [None] * len(pair.live)
    exact = whole = torch.ones((), dtype=torch.bool, device=pair.ends[0].device)
    steps = pair.steps
    starts = pair.starts
    for piece in range(1, count + 1):
        ends = (
            pair.ends
            if piece == count
            else [s + (piece / count) * d for s, d in zip(pair.starts, steps, strict=True)]
        )
        shares, met, arrives = _piece(pair, list(starts), list(ends), grads)
        exact, whole = exact & met, whole & arrives
        for i, g in enumerate(shares):
            if g is not None:
                before = total[i]
                total[i] = g / count if before is None else before + g / count
        starts = tuple(ends)
    return tuple(total), exact, whole


def _piece(
    pair: Pair, starts: list[Tensor], ends: list[Tensor], grads: Sequence[Tensor]
) -> tuple[Grads, Tensor, Tensor]:
    """One piece of the way: what wins at its start gives way to what wins at its end, where these cross."""
    early, first, x_of_first = _picked(pair, starts, ends)
    late, last, s_of_last = _picked(pair, ends, starts)
    here, there = [], []
    exact = whole = torch.ones((), dtype=torch.bool, device=ends[0].device)
    for z0, x0, z, s, g in zip(first, x_of_first, last, s_of_last, grads, strict=True):
        if not z.is_floating_point():
            here.append(g)
            there.append(g)
            continue
        early_share, late_share, fits, arrives = _shares(z0, x0, z, s)
        exact, whole = exact & fits.all(), whole & arrives.all()
        here.append(early_share * g)
        there.append(late_share * g)
    pairs = zip(early(here), late(there), strict=True)
    return tuple(b if a is None else a if b is None else a + b for a, b in pairs), exact, whole


def _shares(z0: Tensor, x0: Tensor, z: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What part of the way the winners at its start and at its end count for.

    Args:
        z0: what wins at the start.
        x0: what that is at the end.
        z: what wins at the end.
        s: what that was at the start.

    Returns:
        The parts, where the two cross once, and where all arrives: where they do not, what differs is shared in
        proportion, unless neither of them moves.
    """
    lead, lag = z0 - s, z - x0
    length = lead + lag
    way = torch.where(length == 0, 0.5, lead / torch.where(length == 0, 1.0, length))
    fits = ((way >= 0) & (way <= 1) & ((length != 0) | (lead == 0))) | way.isnan()
    way = torch.nan_to_num(way, 0.5)
    first, last = x0 - z0, z - s
    size = first.square() + last.square()
    part = (z - z0) / torch.where(size == 0, 1.0, size)
    part = torch.where(part.isfinite(), part, 0.0)
    arrives = fits | (size > 0) | (z == z0)
    return torch.where(fits, way, part * first), torch.where(fits, 1 - way, part * last), fits, arrives


def _picked(
    pair: Pair, at: list[Tensor], other: list[Tensor]
) -> tuple[Callable[[Sequence[Tensor]], Grads], list[Tensor], list[Tensor]]:
    """What is picked at one place.

    Returns:
        How it is pulled back, its values, and the values of what is picked at the other place.
    """
    # Nothing times infinity, as masks are, is no number.
    other = [torch.nan_to_num(x) if x.is_floating_point() else x for x in other]
    if transformed():
        outputs, pull = torch.func.vjp(lambda *values: pair.run(values)[:1], *at)[:2]
        (transposed,) = torch.func.vjp(pull, tuple(torch.zeros_like(z) for z in outputs))[1](tuple(other))
        rest = pair.run(at)[1:]
        return lambda grads: pull(tuple(grads[:1])), [*outputs, *rest], [*transposed, *rest]
    inputs = [leaf(x) for x in at]
    with torch.enable_grad():
        made = pair.run(inputs)
    values = picked_of(inputs, made, other)
    tape = OwnTape(inputs, made)
    return tape.pull, [z.detach() for z in made], values


def picked_of(inputs: Sequence[Tensor], outputs: Sequence[Tensor], other: Sequence[Tensor]) -> list[Tensor]:
    """What ``outputs`` would be of other inputs if the same were picked of them.

    Picking is linear, and so is the vector-Jacobian product in its vector, whose own Jacobian picks.
    """
    with torch.enable_grad():
        vectors = [torch.zeros_like(z).requires_grad_() if z.requires_grad else None for z in outputs]
        pairs = [(z, v) for z, v in zip(outputs, vectors, strict=True) if v is not None]
        pulled_back: Sequence[Tensor | None] = torch.autograd.grad(
            [z for z, _ in pairs],
            list(inputs),
            [v for _, v in pairs],
            create_graph=True,
            allow_unused=True,
        )
        reached = [(g, x) for g, x in zip(pulled_back, other, strict=True) if g is not None]
        picked: Sequence[Tensor | None] = torch.autograd.grad(
            [g for g, _ in reached],
            [v for _, v in pairs],
            [x for _, x in reached],
            allow_unused=True,
        )
    found = iter(picked)
    values = [z.detach() if v is None else next(found) for z, v in zip(outputs, vectors, strict=True)]
    return [torch.zeros_like(z) if x is None else x for z, x in zip(outputs, values, strict=True)]
