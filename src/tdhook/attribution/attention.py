"""Attention: the weights by which tokens look at each other, and the axis that tokens have in a value."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from tensordict.utils import NestedKey
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tdhook.keys import under
from tdhook.passes.within import AsItIs
from tdhook.relevance.rules.attention import attention_scores
from tdhook.tape.conditions import holds

__all__ = ["Watched", "by_token"]


class Watched(AsItIs):
    """The model as it is, whose attention is watched.

    Attributes:
        weights: of each call, ``[sequences, tokens, tokens]``, the mean over heads.
    """

    def __init__(self) -> None:
        self.weights: list[Tensor] = []

    def running(self) -> AbstractContextManager[object]:
        """Watched."""
        self.weights.clear()
        return _Attention(self.weights)


class _Attention(TorchFunctionMode):
    """Notes the weights of attention that is called as a function.

    Args:
        weights: where they are noted.
    """

    def __init__(self, weights: list[Tensor]) -> None:
        super().__init__()
        self._weights = weights

    def __torch_function__(
        self, func: Callable[..., object], types: object, args: Any = (), kwargs: Any = None
    ) -> object:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            _require_one_sequence(args[0], args[1])
            with torch.no_grad():
                seen = {**kwargs, "need_weights": True, "average_attn_weights": True, "training": False}
                each = F.multi_head_attention_forward(*args, **seen)[1]
            assert each is not None
            self._weights.append(each.reshape(-1, *each.shape[-2:]))
        if func is F.scaled_dot_product_attention:
            with torch.no_grad():
                weights = _weights(*args, **kwargs)
            each = weights.mean(-3) if weights.dim() > 3 else weights
            self._weights.append(each.reshape(-1, *each.shape[-2:]))
        return func(*args, **kwargs)


def _weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What the function weighs values with, ``[*batch, heads, tokens, tokens]``, without dropout."""
    return attention_scores(query, key, attn_mask, is_causal, scale, enable_gqa).softmax(-1)


def _require_one_sequence(query: Tensor, key: Tensor) -> None:
    if query is not key and (query.shape != key.shape or not holds(query == key)):
        raise ValueError(
            f"attention looks from one sequence, of shape {list(query.shape)}, at another, of shape {list(key.shape)}, "
            "which rollout says nothing of: explain a model of one sequence"
        )


def by_token(rolled: Tensor, x: Tensor, key: NestedKey) -> Tensor:
    """What each token has, ``[sequences, tokens]``, split evenly over its features, of the shape of a source.

    Raises:
        ValueError: the source has no axis of these tokens.
    """
    sequences, tokens = rolled.shape
    for axis in range(x.dim()):
        if x.shape[:axis].numel() == sequences and x.shape[axis] == tokens:
            rest = x.shape[axis + 1 :]
            share = rolled.reshape(*x.shape[: axis + 1], *(1,) * len(rest)) / rest.numel()
            return share.to(x.dtype).expand(x.shape)
    raise ValueError(
        f"{under(key)!r} has shape {list(x.shape)}, in which no axis is that of the {tokens} tokens of {sequences} "
        "sequences that attention is between: name a module that returns the tokens in input_modules, with "
        "use_inputs=False"
    )
