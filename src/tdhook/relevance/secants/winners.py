"""Winners: functions that pick values, such as maxima and what is sorted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tdhook.relevance.secants.pair import Grads, Pair, difference
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

    Two that cross once share exactly. Where more of them win in turn, the way is cut, for such values alone.
    """
    if pair.chosen:
        return pair.pull(1.0, grads)[0]
    asks = may_ask_of(*pair.ends, *pair.starts)
    counts = _PIECES if asks else (_ENOUGH,)
    if asks and torch.compiler.is_compiling():
        counts = _PIECES[:1]
    starts, ends = _ways(pair)
    total: list[Tensor | None] = [None] * len(pair.live)
    left: list[Tensor] | None = None
    for count in counts:
        pieces = _cut(pair, starts, ends, count)
        met = [_all_of([piece.fits[i] for piece in pieces]) for i in range(len(grads))]
        if count >= _ENOUGH:
            arrives = (_all_of([piece.arrives[i] for piece in pieces]) for i in range(len(grads)))
            met = [torch.logical_or(*both) for both in zip(met, arrives, strict=True)]
        # In a graph, whether one piece is enough is what has to hold afterwards.
        settled = asks and holds(_all_of([(m | ~n).all() for m, n in _each(met, left)]))
        ends_here = settled or count == counts[-1]
        done = left if ends_here else [m & n for m, n in _each(met, left)]
        for piece in pieces:
            for i, g in enumerate(piece.pull(grads, done)[: len(total)]):
                if g is not None:
                    before = total[i]
                    total[i] = g / count if before is None else before + g / count
        if ends_here:
            break
        left = [n & ~m for m, n in _each(met, left)]
    return tuple(total)


def _each(met: list[Tensor], left: list[Tensor] | None) -> Iterable[tuple[Tensor, Tensor]]:
    return zip(met, [torch.ones_like(m) for m in met] if left is None else left, strict=True)


def _all_of(conditions: Sequence[Tensor]) -> Tensor:
    return conditions[0] if len(conditions) == 1 else torch.stack(list(conditions)).all(0)


def _beside(pair: Pair) -> list[int]:
    """Which leaves are numbers that one may be picked of, and are not attributed."""
    return [
        i
        for i, x in enumerate(pair.leaves)
        if isinstance(x, Tensor) and x.is_floating_point() and i not in pair.live
    ]


def _ways(pair: Pair) -> tuple[list[Tensor], list[Tensor]]:
    """All numbers that one may be picked of, those that are attributed first, on the reference and in the call."""
    beside = _beside(pair)
    starts = [*pair.starts, *(pair.beside.get(i, pair.leaves[i]) for i in beside)]
    return starts, [*pair.ends, *(pair.leaves[i] for i in beside)]


def _run(pair: Pair, values: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """What is picked of such numbers."""
    count = len(pair.live)
    return pair.run(values[:count], dict(zip(_beside(pair), values[count:], strict=True)))


@dataclass
class _Piece:
    """A piece of the way: what wins at its start gives way to what wins at its end, where these cross.

    Attributes:
        early: pulls back to what wins at its start, ``late``: to what wins at its end.
        parts: of each output, for which part of the piece the one counts, and for which the other.
        fits: of each output, where the two cross once, and ``arrives``: where all arrives.
    """

    early: Callable[[Sequence[Tensor]], Grads]
    late: Callable[[Sequence[Tensor]], Grads]
    parts: list[tuple[Tensor, Tensor] | None]
    fits: list[Tensor]
    arrives: list[Tensor]

    def pull(self, grads: Sequence[Tensor], of: Sequence[Tensor] | None) -> Grads:
        """What each input counts, by some of the outputs."""
        chosen = grads if of is None else [torch.where(n, g, 0.0) for g, n in zip(grads, of, strict=True)]
        ends = [
            [g if part is None else part[i] * g for g, part in zip(chosen, self.parts, strict=True)]
            for i in (0, 1)
        ]
        pairs = zip(self.early(ends[0]), self.late(ends[1]), strict=True)
        return tuple(b if a is None else a if b is None else a + b for a, b in pairs)


def _cut(pair: Pair, starts: Sequence[Tensor], ends: Sequence[Tensor], count: int) -> list[_Piece]:
    found, at = [], list(starts)
    for piece in range(1, count + 1):
        to = list(ends)
        if piece < count:
            to = [s + (piece / count) * difference(x, s) for s, x in zip(starts, ends, strict=True)]
        found.append(_piece(pair, at, to))
        at = to
    return found


def _piece(pair: Pair, starts: list[Tensor], ends: list[Tensor]) -> _Piece:
    early, first, x_of_first = _picked(pair, starts, ends)
    late, last, s_of_last = _picked(pair, ends, starts)
    made = _Piece(early, late, [], [], [])
    for z0, x0, z, s in zip(first, x_of_first, last, s_of_last, strict=True):
        if z.is_floating_point():
            one, other, fits, arrives = _shares(z0, x0, z, s)
            made.parts.append((one, other))
        else:
            fits = arrives = torch.ones_like(z, dtype=torch.bool)
            made.parts.append(None)
        made.fits.append(fits)
        made.arrives.append(arrives)
    return made


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
        outputs, pull = torch.func.vjp(lambda *values: _run(pair, values)[:1], *at)[:2]
        (transposed,) = torch.func.vjp(pull, tuple(torch.zeros_like(z) for z in outputs))[1](tuple(other))
        rest = _run(pair, at)[1:]
        return lambda grads: pull(tuple(grads[:1])), [*outputs, *rest], [*transposed, *rest]
    inputs = [leaf(x) for x in at]
    with torch.enable_grad():
        made = _run(pair, inputs)
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
