"""Scaled dot-product attention under one rule, at the price of its own backward pass."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdhook.conventions import Convention
from tdhook.relevance.propagation.again import Again
from tdhook.relevance.propagation.call import Call, Run
from tdhook.relevance.propagation.constants import with_constants
from tdhook.relevance.propagation.conversions import Scaled, Substituted
from tdhook.relevance.propagation.rule import RunningRule, converted
from tdhook.tape.functions import on_tape

__all__ = ["AttentionRule", "attention_scores"]


class AttentionRule(RunningRule):
    """``softmax(q k^T / sqrt(d)) v`` in the gradient convention (AttnLRP, Achtibat et al. 2024).

    Both products are shared equally (Prop. 3.3) and the softmax is linearised at its input (Prop. 3.1), for which the
    plain backward pass is right. So values receive half of their gradient, queries and keys a quarter of theirs, and
    the kernel that computes them builds no matrix of attention weights where it does not anyway.

    Args:
        values_only: hold the attention weights constant, so that values take all (Ali et al. 2022; CP-LRP).
    """

    convention: ClassVar[Convention] = "gradient"
    opens_against: ClassVar[bool] = True

    def __init__(self, values_only: bool = False) -> None:
        super().__init__()
        if not isinstance(values_only, bool):
            raise TypeError(f"values_only is True or False, got {values_only!r}")
        self.values_only = values_only

    def running(self, module: nn.Module, flow: Convention) -> Run:
        """On query, key and value with their gradients scaled."""
        return converted(self._scaled, self.convention, flow)

    def against(self, module: nn.Module, flow: Convention) -> Run:
        """Written out as the operations that it is made of, each by its secant."""

        def run(call: Call) -> object:
            draws = (call.args[4] if len(call.args) > 4 else call.kwargs.get("dropout_p", 0.0)) != 0
            again = Again() if draws else None
            with torch.no_grad():
                value = call.execute()
            with nullcontext() if again is None else again.as_before():
                written = attention(*call.args, weigh=self._weigh, **call.kwargs)
            return Substituted.apply(written, value)

        return run

    def _weigh(self, scores: Tensor) -> Tensor:
        weights = scores.softmax(-1)
        return weights.detach() if self.values_only else weights

    def _scaled(self, call: Call) -> object:
        args, kwargs = call.args, call.kwargs
        arguments = {**dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)), **kwargs}
        operands: list[Any] = [arguments.get(name) for name in ("query", "key", "value", "attn_mask")]
        named = {key: x for key, x in kwargs.items() if key not in ("query", "key", "value", "attn_mask")}
        scores = [i for i in (0, 1, 3) if isinstance(operands[i], Tensor) and on_tape(operands[i])]
        factors = [1.0] * 4
        if self.values_only:
            for i in scores:
                operands[i] = operands[i].detach()
        elif scores:
            shared = 0.5 if on_tape(operands[2]) else 1.0
            n_factors = len([i for i in scores if i < 2])
            factors = [shared / n_factors if n_factors else 1.0] * 2 + [0.5, shared]
        scaled = [_times(x, factor) for x, factor in zip(operands, factors, strict=True)]
        outputs = call.function(*scaled, *args[4:], **named)
        kept = [f for x, f in zip(operands, factors, strict=True) if isinstance(x, Tensor) and on_tape(x)]
        unscaled = call.given((*operands, *args[4:]), named)
        return with_constants(unscaled, outputs, factors=kept)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    weigh: Callable[[Tensor], Tensor],
) -> Tensor:
    """Scaled dot-product attention in other operations, as torch defines it.

    Args:
        query: ``[*batch, heads, L, d]``.
        key: ``[*batch, heads, S, d]``.
        value: likewise.
        attn_mask: which keys are attended to, or what is added to the scores.
        dropout_p: which part of the weights is dropped.
        is_causal: whether later keys are left out.
        scale: of the scores, by default ``1 / sqrt(d)``.
        enable_gqa: whether several heads of queries share one of keys and values.
        weigh: makes weights of scores.
    """
    weights = weigh(attention_scores(query, key, attn_mask, is_causal, scale, enable_gqa))
    if enable_gqa:
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    return (F.dropout(weights, dropout_p) if dropout_p else weights) @ value


def attention_scores(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    """What weights are made of, ``[*batch, heads, L, S]``; the arguments are those of :func:`attention`."""
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    scores = query @ key.transpose(-2, -1) * factor
    if is_causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later, -math.inf)
    if attn_mask is not None:
        masks = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -math.inf) if masks else scores + attn_mask
    return scores


def _times(x: object, factor: float) -> object:
    scales = isinstance(x, Tensor) and factor != 1 and on_tape(x)
    return Scaled.apply(x, factor) if scales else x
