"""Averages: the vector-Jacobian product of any function, averaged on the way between its two inputs.

The integral is exact in sum: over the differences of the inputs it is the difference of the outputs (the fundamental
theorem of calculus; Aumann and Shapley 1974 share costs so). Gauss-Legendre quadrature finds it with one node for what
is linear or a product of two, with more for the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tdhook.conventions import per_value
from tdhook.perturbing.quadrature import gauss_legendre
from tdhook.relevance.secants.pair import Grads, Pair, inner
from tdhook.tape.conditions import holds
from tdhook.tape.cotangents import cotangent, equal_but_for_rounding
from tdhook.tape.functions import may_ask_of, parts, whole

__all__ = ["average", "product"]

_NODES = (1, 4, 8, 16, 32, 64)
# Where a graph cannot take more and more of them: enough for what is smooth.
_UNSEEN = 16
_NEARLY = 1e-6
# What part of their size shares may be changed by to sum to what they should.
_SCALES = 0.2


def product(pair: Pair, grads: Sequence[Tensor]) -> Grads:
    """Of what is linear in each of its arguments.

    Of two factors each counts by the other one half way, ``d(ab) = a_mid db + b_mid da``; of more by a quadrature that
    is exact for polynomials of that degree.
    """
    degree = len(pair.live) + len(pair.beside)
    if degree == 1:
        return pair.pull(1.0, grads)[0]  # the same everywhere
    return _quadrature(pair, grads, (degree + 1) // 2)[0]


def average(pair: Pair, grads: Sequence[Tensor]) -> Grads:
    """Of any function: with as many nodes as its sum needs, if that can be looked at."""
    if not may_ask_of(*grads, *pair.ends):
        return _scaled(pair, grads, *_quadrature(pair, grads, _UNSEEN))
    found: Grads = (None,) * len(pair.live)
    rest: Mapping[int, Tensor] = {}
    if torch.compiler.is_compiling():
        found, rest = _quadrature(pair, grads, _UNSEEN)
        # Of each element: where these meet, it is found out without a graph what they share.
        missed, scale = _missed(pair, grads, found, rest, _rows(pair, rest))
        holds(missed.abs() <= _tolerance(pair.ends[0]) * scale)  # a graph is right where they are enough
        return _scaled(pair, grads, found, rest)
    before: Grads | None = None
    for count in _NODES:
        found, rest = _quadrature(pair, grads, count)
        if _is_right(pair, grads, found, rest, before):
            return found
        before = found
    return _scaled(pair, grads, found, rest)


def _is_right(
    pair: Pair, grads: Sequence[Tensor], found: Grads, rest: Mapping[int, Tensor], before: Grads | None
) -> bool:
    """Whether shares sum to what they should: at each place, or in each element and next to what fewer nodes gave.

    Sums may be right by chance, where what two outputs miss cancels, as in what is mirrored.
    """
    if _is_pointwise(pair) and not rest and _is_right_at_each(pair, grads, found):
        return True
    if before is None:
        return False
    tolerance = _tolerance(pair.ends[0])
    missed, scale = _missed(pair, grads, found, rest, _rows(pair, rest))
    if not holds(missed.abs() <= tolerance * scale):
        # Maybe the first axis is none of elements.
        total = missed.sum().abs() <= tolerance * scale.sum()
        if len(missed) == 1 or not holds(total) or _are_apart(pair, len(missed)):
            return False
    return _is_nearly(pair, found, before, scale)


def _is_pointwise(pair: Pair) -> bool:
    """Whether the value may be a function of each place: all is of one shape."""
    return len(pair.outputs) == 1 and all(x.shape == pair.outputs[0].shape for x in pair.ends)


def _is_right_at_each(pair: Pair, grads: Sequence[Tensor], found: Grads) -> bool:
    """Whether shares sum to what they should at each place, as those of a function of each place do."""
    shares = [_at_each(g, d) for g, d in zip(found, pair.steps, strict=True) if g is not None]
    wanted = _at_each(grads[0], pair.rises[0])
    scale = _sum([share.abs() for share in shares]) + wanted.abs()
    return holds((_sum(shares) - wanted).abs() <= _tolerance(pair.ends[0]) * scale)


def _at_each(g: Tensor, d: Tensor) -> Tensor:
    """Products of two tensors, one real number at each place."""
    return inner(g, d).reshape(*d.shape, -1).sum(-1)


def _is_nearly(pair: Pair, found: Grads, before: Grads, scale: Tensor) -> bool:
    """Whether more nodes have changed next to nothing."""
    pairs = [(g, h, d) for g, h, d in zip(found, before, pair.steps, strict=True) if g is not None]
    moved = [inner(g - h, d).abs().max() for g, h, d in pairs if h is not None and g.numel()]
    return not moved or holds(torch.stack(moved).max() <= _NEARLY * scale.max())


def _shares(pair: Pair, found: Grads, rest: Mapping[int, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """What each input counts, and its difference."""
    pairs = [(g, d) for g, d in zip(found, pair.steps, strict=True) if g is not None]
    return pairs + [(g, pair.leaves[i] - pair.beside[i]) for i, g in rest.items()]


def _rows(pair: Pair, rest: Mapping[int, Tensor]) -> int:
    """How long the first axis of all there is is: maybe that of the elements of a batch."""
    count = pair.ends[0].shape[0] if pair.ends[0].dim() else 1
    tensors = [*pair.ends, *pair.outputs, *(pair.leaves[i] for i in rest)]
    return count if count and all(x.dim() and x.shape[0] == count for x in tensors) else 1


def _are_apart(pair: Pair, rows: int) -> bool:
    """Whether no output depends on an input at another place of the first axis: pull-backs of two cotangents tell."""
    if rows == 1:
        return False
    kinds = [z.is_floating_point() or z.is_complex() for z in pair.outputs]
    one = [cotangent(z, 1) if kind else z for z, kind in zip(pair.outputs, kinds, strict=True)]
    weights = cotangent(one[0].new_empty(rows, dtype=pair.ends[0].dtype), 2)
    other = [_times(v, weights) if kind else v for v, kind in zip(one, kinds, strict=True)]
    (first, _), (second, _) = pair.pull(0.5, one), pair.pull(0.5, other)
    return all(
        (g is None) is (h is None)
        and (g is None or h is None or equal_but_for_rounding(parts(_times(g, weights)), parts(h)))
        for g, h in zip(first, second, strict=True)
    )


def _times(x: Tensor, weights: Tensor) -> Tensor:
    return x * weights.reshape(-1, *[1] * (x.dim() - 1)).to(x.dtype)


def _missed(
    pair: Pair, grads: Sequence[Tensor], found: Grads, rest: Mapping[int, Tensor], rows: int
) -> tuple[Tensor, Tensor]:
    """What shares do not sum to of what they should, and of which size the terms are, at each place of an axis."""
    wanted = [inner(g, d).reshape(rows, -1) for g, d in zip(grads, pair.rises, strict=True)]
    shares = [inner(g, d).reshape(rows, -1) for g, d in _shares(pair, found, rest)]
    missed = _sum([share.sum(1) for share in shares]) - _sum([amount.sum(1) for amount in wanted])
    sizes = (_sum([amount.abs().sum(1) for amount in amounts]) for amounts in (shares, wanted))
    return missed, torch.maximum(*sizes)


def _scaled(pair: Pair, grads: Sequence[Tensor], found: Grads, rest: Mapping[int, Tensor]) -> Grads:
    """What quadrature leaves, where a function has kinks on the way, shared in proportion by each batch element.

    Of a function of each place it is shared there, all of it.
    """
    # Inside torch.vmap no axis is that of the batch.
    asks = may_ask_of(*grads, *pair.ends)
    rows = _rows(pair, rest) if asks else 1
    if asks and not torch.compiler.is_compiling():
        if not rest and _is_elementwise(pair):
            return _scaled_at_each(pair, grads, found)
        rows = rows if _are_apart(pair, rows) else 1
    missed, _ = _missed(pair, grads, found, rest, rows)
    size = _sum([inner(g, d).abs().reshape(rows, -1).sum(1) for g, d in _shares(pair, found, rest)])
    part = -missed / torch.where(size == 0, 1.0, size)
    part = torch.where(part.abs() < _SCALES, part, 0.0)

    def scaled(g: Tensor, d: Tensor) -> Tensor:
        sign = inner(g, d).sign().reshape(rows, -1)
        factor = (1 + part.unsqueeze(1) * sign).reshape(parts(g).shape)
        return whole(parts(g) * factor.to(parts(g).dtype), g)

    return tuple(None if g is None else scaled(g, d) for g, d in zip(found, pair.steps, strict=True))


def _scaled_at_each(pair: Pair, grads: Sequence[Tensor], found: Grads) -> Grads:
    """Shares of a function of each place, which sum to what they should: in proportion, or to the differences."""
    steps = pair.steps
    slopes = [torch.zeros_like(d) if g is None else g for g, d in zip(found, steps, strict=True)]
    pairs = list(zip(slopes, steps, strict=True))
    missed = _at_each(grads[0], pair.rises[0]) - _sum([_at_each(g, d) for g, d in pairs])
    shares = _sum([inner(g, d).abs().reshape(*d.shape, -1).sum(-1) for g, d in pairs])
    size = torch.where(shares == 0, _sum([_at_each(d, d) for d in steps]), shares)
    part = per_value(size, missed).unsqueeze(-1)

    def more(g: Tensor, d: Tensor) -> Tensor:
        slope, step, product = (x.reshape(*d.shape, -1) for x in (parts(g), parts(d), inner(g, d)))
        made = slope + part * torch.where(shares.unsqueeze(-1) == 0, step, product.sign() * slope)
        return whole(made.reshape(parts(g).shape), g)

    return tuple(more(g, d) for g, d in pairs)


def _is_elementwise(pair: Pair) -> bool:
    """Whether each entry of the one value is a function of those at its place: pull-backs of two cotangents tell."""
    if not _is_pointwise(pair):
        return False
    one, other = (cotangent(pair.outputs[0], seed) for seed in (1, 2))
    (first, _), (second, _) = (pair.pull(0.5, [v]) for v in (one, other))
    return all(
        (g is None) is (h is None) and (g is None or h is None or equal_but_for_rounding(g * other, h * one))
        for g, h in zip(first, second, strict=True)
    )


def _sum(amounts: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(amounts)).sum(0)


def _quadrature(pair: Pair, grads: Sequence[Tensor], count: int) -> tuple[Grads, dict[int, Tensor]]:
    total: list[Tensor | None] = [None] * len(pair.live)
    others: dict[int, Tensor] = {}
    for place, weight in [(0.5, 1.0)] if count == 1 else gauss_legendre(count):
        found, rest = pair.pull(place, grads)
        for i, g in enumerate(found):
            if g is not None:
                before = total[i]
                total[i] = weight * g if before is None else before + weight * g
        for i, g in rest.items():
            others[i] = others[i] + weight * g if i in others else weight * g
    return tuple(total), others


def _tolerance(x: Tensor) -> float:
    """How far a sum may be off: what rounding makes of it anyway."""
    return 16 * torch.finfo(x.dtype).eps if x.is_floating_point() or x.is_complex() else 0.0
