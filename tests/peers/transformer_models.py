"""Tiny transformers that two libraries explain, with random weights: alike wherever they are built."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

VOCABULARY, LENGTH, BATCH = 61, 7, 3
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4}
TEXT = {**SIZES, "vocab_size": VOCABULARY, "max_position_embeddings": 32, "pad_token_id": 0}
GROUPED = {**TEXT, "num_key_value_heads": 2}
GPT2 = {"n_embd": 16, "n_layer": 3, "n_head": 4, "n_positions": 32, "vocab_size": VOCABULARY}


@dataclass(frozen=True)
class Case:
    """One architecture.

    Attributes:
        family: the module of the transformers library that holds it.
        model: its class there.
        embedding: the path of the module that embeds tokens.
        config: what its configuration is given.
    """

    family: str
    model: str
    embedding: str
    config: dict[str, Any] = field(hash=False)

    @property
    def source(self) -> ModuleType:
        """The module that defines the architecture."""
        return import_module(f"transformers.models.{self.family}.modeling_{self.family}")

    def build(self, attention: str) -> nn.Module:
        """The model as if it had been trained: no parameter is where it was at the start.

        ``attention`` is ``"sdpa"`` for the fused function or ``"eager"`` for products and a softmax.
        """
        cls = getattr(self.source, self.model)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            model = cls(cls.config_class(**self.config, attn_implementation=attention)).double().eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.2 * torch.randn_like(parameter))
        built: nn.Module = model.requires_grad_(False)
        return built


CASES = {
    "gpt2": Case("gpt2", "GPT2LMHeadModel", "transformer.wte", GPT2),
    "llama": Case("llama", "LlamaForCausalLM", "model.embed_tokens", GROUPED),
    "bert": Case("bert", "BertForSequenceClassification", "bert.embeddings.word_embeddings", TEXT),
    "qwen2": Case("qwen2", "Qwen2ForCausalLM", "model.embed_tokens", GROUPED),
    "qwen3": Case("qwen3", "Qwen3ForCausalLM", "model.embed_tokens", {**GROUPED, "head_dim": 8}),
    "gemma3": Case(
        "gemma3", "Gemma3ForCausalLM", "model.embed_tokens", {**GROUPED, "head_dim": 8, "sliding_window": 4}
    ),
}
ATTENTION = ("sdpa", "eager")


def tokens() -> Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return torch.randint(3, VOCABULARY, (BATCH, LENGTH))


def answer(logits: Tensor) -> Tensor:
    """The logits; of a model that has some for each position, those of the last one."""
    return logits[:, -1] if logits.dim() == 3 else logits


class _Double:
    """``torch``, in which ``float32`` is ``float64``."""

    def __getattr__(self, name: str) -> Any:
        return torch.float64 if name == "float32" else getattr(torch, name)


@contextmanager
def in_double(*sources: ModuleType) -> Iterator[None]:
    """What these modules cast to single precision on the way, as their normalisation does, stays in double."""
    with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
        patches = [mock.patch.object(source, "torch", _Double()) for source in sources]
        for patch in patches:
            patch.start()
        try:
            yield
        finally:
            for patch in patches:
                patch.stop()
