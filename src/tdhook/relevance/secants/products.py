"""Products of two, without running them again: ``d(ab) = a_mid db + b_mid da``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tdhook.relevance.secants.averages import product
from tdhook.relevance.secants.pair import Grads, Pair
from tdhook.relevance.secants.slopes import scaled

__all__ = ["matrix_product", "pointwise_product"]


def pointwise_product(pair: Pair, grads: Sequence[Tensor]) -> Grads:
    """Of ``a * b``."""
    if not _is_of_two(pair):
        return scaled(pair, grads)
    a, b = _middles(pair)
    return (grads[0] * b).sum_to_size(a.shape), (grads[0] * a).sum_to_size(b.shape)


def matrix_product(pair: Pair, grads: Sequence[Tensor]) -> Grads:
    """Of ``a @ b``."""
    if not _is_of_two(pair) or min(x.dim() for x in pair.ends) < 2:
        return product(pair, grads)
    a, b = _middles(pair)
    dtype = torch.promote_types(a.dtype, b.dtype)  # under autocast they may be others
    a, b, g = (x.to(dtype) for x in (a, b, grads[0]))
    return (g @ b.mT).sum_to_size(a.shape), (a.mT @ g).sum_to_size(b.shape)


def _is_of_two(pair: Pair) -> bool:
    plain = len(pair.live) == 2 and len(pair.leaves) == 2 and not pair.differs
    return plain and not any(x.is_complex() for x in pair.ends)


def _middles(pair: Pair) -> list[Tensor]:
    return [torch.lerp(start.expand_as(x), x, 0.5) for start, x in zip(pair.starts, pair.ends, strict=True)]
