"""Kernels: operators that graphs call where models call functions, written as these functions.

An exported model calls ``torch.ops.aten.native_layer_norm``, say, which gives the value and what its own derivative
needs. The value alone is explained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from tdhook.relevance.propagation.conversions import Substituted

__all__ = ["by_place", "first_output", "of_a_kernel", "positional"]

Written: TypeAlias = Callable[..., Tensor]
Outputs: TypeAlias = Sequence[Tensor]
Maybe: TypeAlias = "Tensor | None"


class Argument(Protocol):
    """What the signature of an operator says of one argument."""

    name: str
    kwarg_only: bool


class Signature(Protocol):
    """The signature of one overload of an operator."""

    @property
    def arguments(self) -> Sequence[Argument]:
        """Its arguments, in order."""


def positional(
    schema: Signature, args: Iterable[object], kwargs: Mapping[str, object]
) -> tuple[tuple[object, ...], dict[str, object]]:
    """Arguments of an overload with all by position that can be, as functions of torch are called."""
    given, named = list(args), dict(kwargs)
    for argument in schema.arguments[len(given) :]:
        if argument.kwarg_only or argument.name not in named:
            break
        given.append(named.pop(argument.name))
    return tuple(given), named


def by_place(
    names: Sequence[str], args: Iterable[object], kwargs: Mapping[str, object]
) -> tuple[tuple[object, ...], dict[str, object]]:
    """Arguments of a function with its operands by position, in whatever order they are given by name.

    Args:
        names: of its first parameters, in order.
        args: its arguments by position.
        kwargs: by name.
    """
    given, named = list(args), dict(kwargs)
    if not given and "self" in named:
        given.append(named.pop("self"))
    for name in names[len(given) :]:
        if not isinstance(named.get(name), Tensor):
            break
        given.append(named.pop(name))
    return tuple(given), named


def first_output(name: str) -> Written | None:
    """The first output of a kernel, given all of them and its arguments, as functions that have rules compute it."""
    return _KERNELS.get(name)


def of_a_kernel(
    mode: AbstractContextManager[object],
    first: Written,
    kernel: Callable[..., Sequence[Tensor]],
    args: tuple[object, ...],
    kwargs: dict[str, object],
) -> tuple[Tensor, ...]:
    """The values of a kernel, the first of them on the tape of the functions that make the same.

    Args:
        mode: what sees these functions.
        first: what calls them (:func:`first_output`).
        kernel: the kernel.
        args: what it is called with.
        kwargs: by name.
    """
    with torch.no_grad():
        value, *others = kernel(*args, **kwargs)
    with mode:
        written = first((value, *others), *args, **kwargs)
    return (Substituted.apply(written, value), *others)


def _layer_norm(
    values: Outputs,
    x: Tensor,
    shape: Sequence[int],
    weight: Maybe = None,
    bias: Maybe = None,
    eps: float = 1e-5,
) -> Tensor:
    return F.layer_norm(x, shape, weight, bias, eps)


def _rms_norm(
    values: Outputs, x: Tensor, shape: Sequence[int], weight: Maybe = None, eps: float | None = None
) -> Tensor:
    return F.rms_norm(x, shape, weight, eps)


def _group_norm(
    values: Outputs,
    x: Tensor,
    weight: Maybe,
    bias: Maybe,
    n: int,
    c: int,
    pixels: int,
    groups: int,
    eps: float,
) -> Tensor:
    return F.group_norm(x, groups, weight, bias, eps)


def _batch_norm(
    values: Outputs,
    x: Tensor,
    weight: Maybe,
    bias: Maybe,
    mean: Maybe,
    var: Maybe,
    training: bool,
    momentum: float,
    eps: float,
    *rest: object,
) -> Tensor:
    # The kernel has already counted the batch.
    kept = (None, None) if training else (mean, var)
    return torch.batch_norm(x, weight, bias, kept[0], kept[1], training, momentum, eps, False)


def _batch_norm_without_statistics(
    values: Outputs, x: Tensor, weight: Maybe, bias: Maybe, training: bool, momentum: float, eps: float
) -> Tensor:
    return torch.batch_norm(x, weight, bias, None, None, True, momentum, eps, False)


def _batch_norm_legit(values: Outputs, *args: Any) -> Tensor:
    """The overload with statistics, or the one without."""
    return (_batch_norm_without_statistics if isinstance(args[3], bool) else _batch_norm)(values, *args)


def _batch_norm_in(training: bool) -> Written:
    def write(
        values: Outputs,
        x: Tensor,
        weight: Maybe,
        bias: Maybe,
        mean: Maybe,
        var: Maybe,
        momentum: float,
        eps: float,
    ) -> Tensor:
        return _batch_norm(values, x, weight, bias, mean, var, training, momentum, eps)

    return write


def _dropout(values: Outputs, x: Tensor, p: float, train: bool | None = True) -> Tensor:
    kept: Tensor = values[1].to(x.dtype)
    return x * (kept / (1 - p)) if train and p < 1 else x * kept


def _attention(
    values: Outputs,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *rest: object,
    attn_mask: Maybe = None,
    scale: float | None = None,
    **named: object,
) -> Tensor:
    return _attended(query, key, value, attn_mask, dropout_p, is_causal, scale=scale)


def _masked_attention(
    values: Outputs,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Maybe,
    statistics: bool,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *rest: object,
    scale: float | None = None,
    **named: object,
) -> Tensor:
    return _attended(query, key, value, mask, dropout_p, is_causal, scale=scale)


def _written_attention(
    values: Outputs,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Maybe = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *rest: object,
    scale: float | None = None,
    **named: object,
) -> Tensor:
    return _attended(query, key, value, mask, dropout_p, is_causal, scale=scale)


def _attended(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Maybe,
    dropout: float = 0.0,
    causal: bool = False,
    *,
    scale: float | None,
) -> Tensor:
    if dropout:
        raise NotImplementedError(
            "an attention kernel that drops attention weights cannot be explained, since it does not tell which; "
            "explain the model in evaluation mode"
        )
    return F.scaled_dot_product_attention(query, key, value, mask, 0.0, causal, scale=scale)


_KERNELS: Mapping[str, Written] = {
    "batch_norm_impl_index": _batch_norm,
    "batch_norm_no_update": _batch_norm_in(False),
    "batch_norm_with_update": _batch_norm_in(True),
    "cudnn_batch_norm": _batch_norm,
    "fused_rms_norm": _rms_norm,
    "miopen_batch_norm": _batch_norm,
    "native_batch_norm": _batch_norm,
    "native_batch_norm_legit": _batch_norm_legit,
    "native_batch_norm_legit_functional": _batch_norm,
    "native_batch_norm_legit_no_training": _batch_norm_in(False),
    "native_dropout": _dropout,
    "native_group_norm": _group_norm,
    "native_layer_norm": _layer_norm,
    "scaled_dot_product_attention_math": _written_attention,
    "scaled_dot_product_cudnn_attention": _masked_attention,
    "scaled_dot_product_efficient_attention": _masked_attention,
    "scaled_dot_product_flash_attention": _attention,
    "scaled_dot_product_flash_attention_for_cpu": _attention,
}
