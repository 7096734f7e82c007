"""Averages: the vector-Jacobian product of any function, averaged on the way between its two inputs.

The integral is exact in sum: over the differences of the inputs it is the difference of the outputs (the fundamental
theorem of calculus; Aumann and Shapley 1974 share costs so). Gauss-Legendre quadrature finds it with one node for what
is linear or a product of two, with more for the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tdhook.perturbing.quadrature import gauss_legendre
from tdhook.relevance.secants.pair import Grads, Pair, inner
from tdhook.tape.conditions import holds
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
    return _quadrature(pair, grads, (degree + 1) // 2)[0]


def average(pair: Pair, grads: Sequence[Tensor]) -> Grads:
    """Of any function: with as many nodes as its sum needs, if that can be looked at."""
    if not may_ask_of(*grads, *pair.ends):
        return _scaled(pair, grads, *_quadrature(pair, grads, _UNSEEN))
    compiling = torch.compiler.is_compiling()
    found: Grads = (None,) * len(pair.live)
    rest: Mapping[int, Tensor] = {}
    scale = torch.zeros((), device=grads[0].device)
    before: Grads | None = None
    alike = all(x.shape == grads[0].shape for x in (*pair.ends, *pair.outputs))
    for count in (_UNSEEN,) if compiling else _NODES:
        found, rest = _quadrature(pair, grads, count)
        missed, size = _missed(pair, grads, found, rest)
        scale = torch.maximum(scale, size)
        # Sums may be right by chance, where what two outputs miss cancels, as in what is mirrored.
        looks = not compiling and (alike or before is not None)
        if looks and holds(missed.abs() <= _tolerance(pair.ends[0]) * scale):
            if alike and _is_right_at_each(pair, grads, found, rest):
                return found
            if before is not None and _is_nearly(pair, found, before, scale):
                return found
        before = found
    return _scaled(pair, grads, found, rest)


def _is_right_at_each(pair: Pair, grads: Sequence[Tensor], found: Grads, rest: Mapping[int, Tensor]) -> bool:
    """Whether shares sum to what they should at each place, as those of a function of each place do."""
    if any(pair.leaves[i].shape != grads[0].shape for i in rest):
        return False
    shares = torch.stack([inner(g, d) for g, d in _shares(pair, found, rest)])
    wanted = torch.stack([inner(g, d) for g, d in zip(grads, pair.rises, strict=True)])
    scale = shares.abs().sum(0) + wanted.abs().sum(0)
    return holds((shares.sum(0) - wanted.sum(0)).abs() <= _tolerance(pair.ends[0]) * scale)


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
    """How many elements of the batch there are, if that is seen: what one misses is not made up by another."""
    count = pair.ends[0].shape[0] if pair.ends[0].dim() else 1
    tensors = [*pair.ends, *pair.outputs, *(pair.leaves[i] for i in rest)]
    return count if count and all(x.dim() and x.shape[0] == count for x in tensors) else 1


def _missed(
    pair: Pair, grads: Sequence[Tensor], found: Grads, rest: Mapping[int, Tensor]
) -> tuple[Tensor, Tensor]:
    """What shares do not sum to of what they should, and of which size the terms are, of each batch element."""
    rows = _rows(pair, rest)
    wanted = [inner(g, d).reshape(rows, -1) for g, d in zip(grads, pair.rises, strict=True)]
    shares = [inner(g, d).reshape(rows, -1) for g, d in _shares(pair, found, rest)]
    missed = _sum([share.sum(1) for share in shares]) - _sum([amount.sum(1) for amount in wanted])
    sizes = (_sum([amount.abs().sum(1) for amount in amounts]) for amounts in (shares, wanted))
    return missed, torch.maximum(*sizes)


def _scaled(pair: Pair, grads: Sequence[Tensor], found: Grads, rest: Mapping[int, Tensor]) -> Grads:
    """What quadrature leaves, where a function has kinks on the way, shared in proportion by each batch element."""
    rows = _rows(pair, rest)
    missed, _ = _missed(pair, grads, found, rest)
    size = _sum([inner(g, d).abs().reshape(rows, -1).sum(1) for g, d in _shares(pair, found, rest)])
    part = -missed / torch.where(size == 0, 1.0, size)
    part = torch.where(part.abs() < _SCALES, part, 0.0)

    def scaled(g: Tensor, d: Tensor) -> Tensor:
        sign = inner(g, d).sign().reshape(rows, -1)
        factor = (1 + part.unsqueeze(1) * sign).reshape(parts(g).shape)
        return whole(parts(g) * factor.to(parts(g).dtype), g)

    return tuple(None if g is None else scaled(g, d) for g, d in zip(found, pair.steps, strict=True))


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
