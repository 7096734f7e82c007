"""Which secant a function has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from tdhook.relevance.secants.averages import average, product
from tdhook.relevance.secants.norms import normalised
from tdhook.relevance.secants.pair import Grads, Pair, Pull
from tdhook.relevance.secants.products import matrix_product, pointwise_product
from tdhook.relevance.secants.shares import log_softmax, logsumexp, softmax, softmin
from tdhook.relevance.secants.slopes import choice, filled, quotient, rounded, scaled, slopes
from tdhook.relevance.secants.winners import winner
from tdhook.selectors.kinds import AFFINE, ELEMENTWISE, FUSED, NORMS, PRODUCTS, WINNER

__all__ = ["LINEAR", "secant_of"]

LINEAR = AFFINE - {
    "batch_norm",
    "embedding_bag",
    "index_reduce",
    "lerp",
    "scatter_reduce",
    "segment_reduce",
    "sparse_mm",
}
"""Linear in what is attributed, where that is one argument or a sum."""


def _reduced(pair: Pair, grads: Sequence[Tensor]) -> Grads:
    """Of what is reduced by groups: the largest or least of each is picked, and all else is arithmetic."""
    picks = pair.argument(4, "reduce") in ("amax", "amin")
    return winner(pair, grads) if picks else average(pair, grads)


_SECANTS: Mapping[str, Pull] = {
    # Those of two values jump as they change sign: of one alone the secant knows it.
    **dict.fromkeys(ELEMENTWISE | {"atan2", "copysign"}, slopes),
    # What a dictionary leaves out is added to what is restored: held constant, and shared out to nobody.
    # So are sums of a value and a product; of a quotient there is no such sum.
    **dict.fromkeys(PRODUCTS | LINEAR | FUSED - {"addcdiv"} | {"restored"}, product),
    **dict.fromkeys(WINNER, winner),
    **dict.fromkeys(NORMS, normalised),
    **dict.fromkeys(("add", "sub", "rsub"), scaled),
    "mul": pointwise_product,
    **dict.fromkeys(("matmul", "bmm", "mm"), matrix_product),
    "div": quotient,
    **dict.fromkeys(("floor_divide", "fmod", "remainder"), rounded),
    "softmax": softmax,
    "softmin": softmin,
    "log_softmax": log_softmax,
    "logsumexp": logsumexp,
    "where": choice,
    "masked_fill": filled,
    **dict.fromkeys(("index_reduce", "scatter_reduce"), _reduced),
}
# Modules have the secant of the function that they are named after.
_BY_CLASS = {name.replace("_", ""): secant for name, secant in _SECANTS.items()}
_PREFIX = ("instance", "group", "layer", "rms")


def secant_of(name: str, *, is_module: bool = False) -> Pull:
    """The secant of an operation, or of a module by the name of its class; an average of derivatives by default."""
    if not is_module:
        return _SECANTS.get(name, average)
    plain = name.lower()
    if plain.startswith(_PREFIX) and plain.rstrip("123d").endswith("norm"):
        return normalised
    return _BY_CLASS.get(plain, average)
