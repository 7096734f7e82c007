"""Attention rollout: where what is read at a token came from, by attention weights alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tdhook.contexts.attribution import Attribution, Shared
from tdhook.keys import under
from tdhook.passes.runner import Runner
from tdhook.passes.within import AsItIs
from tdhook.tape.conditions import holds
from tdhook.targets import TargetLike

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["AttentionRollout"]


class AttentionRollout(Attribution):
    """The product over layers of attention weights, each mixed with the identity (Abnar and Zuidema 2020, section 3).

    Weights are those of ``nn.MultiheadAttention`` (so of ``nn.TransformerEncoderLayer``) and of
    ``F.scaled_dot_product_attention``, of all calls in their order; where these hide them, they are computed anew. They
    tell where a token looked, for whatever output and neither for nor against it. What a token has is split evenly over
    its features. Attribute values that have the axis of the tokens, by ``input_modules`` where inputs do not.

    Args:
        target: what is explained; only a check that it is there.
        token: whose way back is followed, counted from the end if negative; by default the mean over all.
        identity: what of each layer goes past the attention, one half in the paper.
        **options: those of :class:`~tdhook.contexts.attribution.Attribution`: ``attribute``, ``input_modules``, ...

    Raises:
        ValueError: the share is not between 0 and 1, no attention is seen, it looks from one sequence at another,
            layers have other tokens, or what is attributed has no axis of tokens.
        IndexError: there is no such token.
    """

    def __init__(
        self,
        target: TargetLike = None,
        *,
        token: int | None = None,
        identity: float = 0.5,
        **options: Unpack[Shared],
    ) -> None:
        super().__init__(target, **options)
        if not 0 <= identity < 1:
            raise ValueError(
                f"identity={identity} is what goes past each attention: give a share from 0 to below 1"
            )
        self.token, self.identity = token, identity

    def explain(self, runner: Runner, td: TensorDictBase) -> Mapping[NestedKey, Tensor]:
        """One forward pass that watches attention."""
        watch = _Watched()
        with runner.forward(td, watch) as run:
            run.seeds(self.seeder)
            rolled = self._rolled(watch.weights, type(runner.setup.model.root).__name__)
            return {key: _by_token(rolled, x, key) for key, x in run.sources().items()}

    def _rolled(self, weights: list[Tensor], who: str) -> Tensor:
        """How much of each token arrives, ``[sequences, tokens]``."""
        if not weights:
            raise ValueError(
                f"{who} calls neither nn.MultiheadAttention nor F.scaled_dot_product_attention on the way to the "
                "target, so that there is no attention to roll out; a perturbation method takes tokens as features="
            )
        found: Tensor | None = None
        for layer in weights:
            if layer.shape[-1] != layer.shape[-2] or (found is not None and layer.shape != found.shape):
                raise ValueError(
                    f"attention weights of shapes {[list(one.shape) for one in weights]} are not all between the same "
                    "tokens, and cannot be rolled out"
                )
            step = self.identity * torch.eye(layer.shape[-1]).to(layer) + (1 - self.identity) * layer
            found = step if found is None else step @ found
        assert found is not None
        count = found.shape[-1]
        if self.token is None:
            return found.mean(1)
        if not -count <= self.token < count:
            raise IndexError(f"there is no token {self.token}: sequences have {count}")
        return found[:, self.token]


class _Watched(AsItIs):
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
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~seen, -torch.inf)
    if attn_mask is not None:
        hidden = attn_mask.dtype is torch.bool
        scores = scores.masked_fill(~attn_mask, -torch.inf) if hidden else scores + attn_mask
    return scores.softmax(-1)


def _require_one_sequence(query: Tensor, key: Tensor) -> None:
    if query is not key and (query.shape != key.shape or not holds(query == key)):
        raise ValueError(
            f"attention looks from one sequence, of shape {list(query.shape)}, at another, of shape {list(key.shape)}, "
            "which rollout says nothing of: explain a model of one sequence"
        )


def _by_token(rolled: Tensor, x: Tensor, key: NestedKey) -> Tensor:
    """What each token has, ``[sequences, tokens]``, split evenly over its features, of the shape of a source."""
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
