"""Averages: the vector-Jacobian product of any function, averaged on the way between its two inputs.

The integral is exact in sum: over the differences of the inputs it is the difference of the outputs (the fundamental
theorem of calculus; Aumann and Shapley 1974 share costs so). Gauss-Legendre quadrature finds it with one node for what
is linear or a product of two, with more for the rest.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tdhook.perturbing.quadrature import gauss_legendre
from tdhook.relevance.secants.pair import Grads, Pair, inner
from tdhook.tape.functions import may_look_at

__all__ = ["average", "product"]

_NODES = (1, 4, 8, 16, 32, 64)
# Where values cannot be looked at: enough for what is smooth.
_UNSEEN = 16
# By how much shares may be scaled to what they should sum to.
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
    if not all(may_look_at(g) for g in (*grads, *pair.ends)):
        return _quadrature(pair, grads, _UNSEEN)[0]
    terms = list(zip(grads, pair.rises, strict=True))
    wanted = sum(inner(g, d).sum() for g, d in terms)
    scale = sum(inner(g, d).abs().sum() for g, d in terms)
    found: Grads = (None,) * len(pair.live)
    for count in _NODES:
        found, rest = _quadrature(pair, grads, count)
        shares = [inner(g, d) for g, d in zip(found, pair.steps, strict=True) if g is not None]
        shares += [inner(g, pair.leaves[i] - pair.beside[i]) for i, g in rest.items()]
        made = sum(share.sum() for share in shares)
        scale = max(scale, sum(share.abs().sum() for share in shares))
        if abs(float(made - wanted)) <= _tolerance(pair.ends[0]) * float(scale):
            return found
    return _scaled(pair, grads, found)


def _scaled(pair: Pair, grads: Sequence[Tensor], found: Grads) -> Grads:
    """What quadrature leaves, where a function has kinks on the way, shared in proportion by each batch element."""
    count = pair.ends[0].shape[0] if pair.ends[0].dim() else 1
    tensors = [*pair.ends, *pair.outputs]
    rows = count if all(x.dim() and x.shape[0] == count for x in tensors) else 1
    wanted = _per_row(grads, pair.rises, rows)
    made = _per_row(found, pair.steps, rows)
    factor = wanted / torch.where(made == 0, 1.0, made)
    factor = torch.where((factor - 1).abs() < _SCALES, factor, 1.0)
    return tuple(
        None if g is None else (g.reshape(rows, -1) * factor.to(g.dtype).unsqueeze(1)).reshape(g.shape)
        for g in found
    )


def _per_row(grads: Sequence[Tensor | None], differences: Sequence[Tensor], rows: int) -> Tensor:
    pairs = [(g, d) for g, d in zip(grads, differences, strict=True) if g is not None]
    return torch.stack([inner(g, d).reshape(rows, -1).sum(1) for g, d in pairs]).sum(0)


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
