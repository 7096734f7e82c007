"""Operations that are made of others: their inside is looked at in turn."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from tdhook.relevance.operations.placing import PLACING
from tdhook.relevance.propagation.conversions import Substituted

__all__ = ["in_parts", "statistics_written_out", "written_out"]

Function = Callable[..., Any]
Axes: TypeAlias = "int | Sequence[int] | None"


def written_out(name: str) -> Function | None:
    """The computation of a fused operation in others, with the value of the fused one; ``None`` if it is not fused."""
    return _WRITTEN.get(name)


def in_parts(
    mode: AbstractContextManager[object],
    inside: Function,
    fused: Function,
    args: tuple[object, ...],
    kwargs: dict[str, object],
) -> Tensor | tuple[Tensor, ...]:
    """The values of a fused operation, on the tape of those that it is made of.

    Args:
        mode: what sees these.
        inside: what calls them (:func:`written_out`).
        fused: the operation.
        args: what it is called with.
        kwargs: by name.
    """
    with torch.no_grad():
        values = fused(*args, **kwargs)
    with mode:
        written = inside(*args, **kwargs)
    if isinstance(values, Tensor):
        made: Tensor = Substituted.apply(written, values)
        return made
    # Some have names for what they return.
    several: tuple[Tensor, ...] = type(values)(
        Substituted.apply(w, v) for w, v in zip(written, values, strict=True)
    )
    return several


def _sum_and_product(product: Function) -> Function:
    def write(
        input: Tensor,
        *factors: Tensor,
        beta: float = 1,
        alpha: float = 1,
        value: float = 1,
        out: object = None,
        **named: Tensor,
    ) -> Tensor:
        # By name they are mat1 and mat2, batch1 and batch2, mat and vec, ...
        term: Tensor = product(*factors, *(named[key] for key in sorted(named)))
        scale = alpha if alpha != 1 else value
        term = term if scale == 1 else term * scale
        if beta == 0:  # it is not read, and may be memory that holds no numbers
            return term
        total: Tensor = (input if beta == 1 else input * beta) + term
        return total

    return write


def _glu(input: Tensor, dim: int = -1) -> Tensor:
    signal, gate = input.chunk(2, dim)
    return signal * gate.sigmoid()


def _cosine_similarity(x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    return (F.normalize(x1, dim=dim, eps=eps) * F.normalize(x2, dim=dim, eps=eps)).sum(dim)


def _of_difference(function: Function) -> Function:
    """A loss of the difference of two tensors: it passes relevance on to the difference, as an activation does."""

    def write(*args: object, **kwargs: object) -> Tensor:
        given = inspect.signature(function).bind(*args, **kwargs).arguments
        one_by_one = {key: value for key, value in given.items() if key not in ("size_average", "reduce")}
        size = (given["input"] - given["target"]).abs()
        with torch.no_grad():
            total = function(**given)
            each = function(**{**one_by_one, "reduction": "none"})
        losses: Tensor = size * _share(each, size)
        if total.shape != losses.shape:
            whole = losses.sum()
            losses = whole * _share(total, whole)
        return losses

    return write


def _share(part: Tensor, whole: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.where(whole == 0, 0.0, part / whole)


def _lerp(input: Tensor, end: Tensor, weight: Tensor) -> Tensor:
    return input + weight * (end - input)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    product = torch.matmul(input, weight.mT)
    return product if bias is None else product + bias


def _of_the_first(function: Function) -> Function:
    """The first argument takes all: it is what is raised to a power, or divided."""
    return lambda input, other, **kwargs: function(input, other.detach(), **kwargs)


def _xlogy(input: Tensor, other: Tensor, out: object = None) -> Tensor:
    return torch.where(input == 0, 0.0, input * other.log())


def _frexp(input: Tensor, out: object = None) -> tuple[Tensor, Tensor]:
    """The exponent is decided by the value, and what divides it is a constant."""
    with torch.no_grad():
        mantissa, exponent = torch.frexp(input)
        divisor = torch.where(input.isfinite() & (input != 0), input / (2 * mantissa), 1.0)
    return input / divisor / 2, exponent


def _ldexp(input: Tensor, other: Tensor, out: object = None) -> Tensor:
    return input * torch.exp2(other)


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    *others: object,
    **named: object,
) -> Tensor:
    return weight[input] if max_norm is None else _shortened()


def _shortened(*args: object, **kwargs: object) -> Tensor:
    raise NotImplementedError(
        "`embedding` with max_norm overwrites its table off the tape, and this one depends on the inputs, so that no "
        "rule can follow: normalise the table before"
    )


def _powers(x: Tensor, N: int | None = None, increasing: bool = False) -> Tensor:
    count = x.shape[-1] if N is None else N
    first: list[Tensor] = [torch.ones_like(x), x]
    columns = [*first, *(x**power for power in range(2, count))][:count]
    return torch.stack(columns if increasing else columns[::-1], -1) if columns else x.new_empty(*x.shape, 0)


def _increasing_powers(x: Tensor, *, N: int | None = None) -> Tensor:
    return _powers(x, N, increasing=True)


def _gaussian_nll_loss(
    input: Tensor,
    target: Tensor,
    var: Tensor | float,
    full: bool = False,
    eps: float = 1e-6,
    reduction: str = "mean",
) -> Tensor:
    spread = var if isinstance(var, Tensor) else torch.full_like(input, var)
    if spread.shape == input.shape[:-1]:
        spread = spread.unsqueeze(-1)
    spread = spread.clamp(min=eps)
    losses: Tensor = 0.5 * (spread.log() + (input - target).square() / spread)
    if full:
        losses = losses + 0.5 * math.log(2 * math.pi)
    return losses if reduction == "none" else losses.sum() if reduction == "sum" else losses.mean()


def _axes(input: Tensor, dim: Axes) -> tuple[int, ...]:
    if dim is None:
        return tuple(range(input.dim()))
    return (dim,) if isinstance(dim, int) else tuple(dim)


def _var(
    input: Tensor,
    dim: Axes | bool = None,
    unbiased: bool = True,
    keepdim: bool = False,
    *,
    correction: float | None = None,
    out: object = None,
) -> Tensor:
    if isinstance(dim, bool):
        return _var(input, None, dim, keepdim, correction=correction)
    axes = _axes(input, dim)
    count = math.prod(input.shape[axis] for axis in axes)
    taken = int(unbiased) if correction is None else correction
    squares = (input - input.mean(axes, keepdim=True)).square()
    return squares.sum(axes, keepdim=keepdim) / max(count - taken, 0)


def _var_mean(
    input: Tensor, dim: Axes | bool = None, unbiased: bool = True, keepdim: bool = False, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    if isinstance(dim, bool):
        return _var_mean(input, None, dim, keepdim, **kwargs)
    mean = input.mean(_axes(input, dim), keepdim=keepdim)
    return _var(input, dim, unbiased, keepdim, **kwargs), mean


def _std_mean(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    variance, mean = _var_mean(*args, **kwargs)
    return variance.sqrt(), mean


_WRITTEN: dict[str, Function] = {
    **PLACING,
    "addmm": _sum_and_product(torch.matmul),
    "addmv": _sum_and_product(torch.matmul),
    "addr": _sum_and_product(torch.outer),
    "baddbmm": _sum_and_product(torch.matmul),
    "addbmm": _sum_and_product(lambda a, b: torch.matmul(a, b).sum(0)),
    "addcmul": _sum_and_product(torch.mul),
    "addcdiv": _sum_and_product(torch.div),
    "cosine_similarity": _cosine_similarity,
    "embedding": _embedding,
    "embedding_bag": _shortened,  # where it shortens
    "float_power": _of_the_first(torch.float_power),
    "floor_divide": _of_the_first(torch.floor_divide),
    "frexp": _frexp,
    "gaussian_nll_loss": _gaussian_nll_loss,
    "glu": _glu,
    "huber_loss": _of_difference(F.huber_loss),
    "l1_loss": _of_difference(F.l1_loss),
    "ldexp": _ldexp,
    "lerp": _lerp,
    "linalg_vander": _increasing_powers,
    "linear": _linear,
    "mse_loss": _of_difference(F.mse_loss),
    "pow": _of_the_first(torch.pow),
    "smooth_l1_loss": _of_difference(F.smooth_l1_loss),
    "std_mean": _std_mean,
    "vander": _powers,
    "var": _var,
    "var_mean": _var_mean,
    "xlogy": _xlogy,
}


def statistics_written_out(name: str) -> Function | None:
    """Roots of sums, which are one function to the rules for values, in others that have secants of their own."""
    return _STATISTICS.get(name)


def _std(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return torch.var(input, *args, **kwargs).sqrt()


def _vector_norm(
    x: Tensor, ord: Any = 2, dim: Any = None, keepdim: bool = False, dtype: Any = None, out: Any = None
) -> Tensor:
    x = x if dtype is None else x.to(dtype)
    axes = tuple(range(x.dim())) if dim is None else dim
    if ord == 2:
        return x.square().sum(axes, keepdim=keepdim).sqrt()
    if ord == 1:
        return x.abs().sum(axes, keepdim=keepdim)
    if ord == math.inf:
        return x.abs().amax(axes, keepdim=keepdim)
    if ord == -math.inf:
        return x.abs().amin(axes, keepdim=keepdim)
    if ord == 0:
        return (x != 0).to(x.dtype).sum(axes, keepdim=keepdim)
    total: Tensor = (x.abs() ** ord).sum(axes, keepdim=keepdim) ** (1 / ord)
    return total


def _norm(
    input: Tensor, p: Any = "fro", dim: Any = None, keepdim: bool = False, out: Any = None, dtype: Any = None
) -> Tensor:
    if p == "nuc":
        found: Tensor = torch.linalg.matrix_norm(
            input, p, (-2, -1) if dim is None else dim, keepdim, dtype=dtype
        )
        return found
    return _vector_norm(input, 2 if p in ("fro", None) else p, dim, keepdim, dtype)


def _linalg_norm(
    A: Tensor, ord: Any = None, dim: Any = None, keepdim: bool = False, *, out: Any = None, dtype: Any = None
) -> Tensor:
    of_matrices = A.dim() == 2 if dim is None else isinstance(dim, Sequence) and len(dim) == 2
    if of_matrices and ord not in (None, "fro"):
        axes = (-2, -1) if dim is None else dim
        found: Tensor = torch.linalg.matrix_norm(A, ord, axes, keepdim, dtype=dtype)
        return found
    return _vector_norm(A, 2 if ord in (None, "fro") else ord, dim, keepdim, dtype)


def _dist(input: Tensor, other: Tensor, p: float = 2) -> Tensor:
    return _vector_norm(input - other, p)


def _pairwise_distance(
    x1: Tensor, x2: Tensor, p: float = 2.0, eps: float = 1e-6, keepdim: bool = False
) -> Tensor:
    return _vector_norm(x1 - x2 + eps, p, -1, keepdim)


def _hypot(input: Tensor, other: Tensor, out: Any = None) -> Tensor:
    return (input.square() + other.square()).sqrt()


_STATISTICS: dict[str, Function] = {
    "dist": _dist,
    "hypot": _hypot,
    "linalg_norm": _linalg_norm,
    "linalg_vector_norm": _vector_norm,
    "norm": _norm,
    "pairwise_distance": _pairwise_distance,
    "std": _std,
}
