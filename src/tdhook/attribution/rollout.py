"""Attention rollout: where what is read at a token came from, by attention weights alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook.attribution.attention import Watched, by_token
from tdhook.contexts.attribution import Attribution, Shared
from tdhook.passes.runner import Runner
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
        watch = Watched()
        with runner.forward(td, watch) as run:
            run.seeds(self.seeder)
            rolled = self._rolled(watch.weights, type(runner.setup.model.root).__name__)
            return {key: by_token(rolled, x, key) for key, x in run.sources().items()}

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
