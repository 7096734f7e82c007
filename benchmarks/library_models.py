"""Models of other libraries, with random weights: `Unavailable` says what is not installed."""

from __future__ import annotations

import importlib
import importlib.util
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["LanguageModel", "Unavailable", "hf_gpt2", "hf_llama", "import_torchvision", "resnet50", "vgg11"]


class Unavailable(Exception):
    """Something cannot be measured here; the message says why."""


def needed(library: str) -> Any:
    """The library, imported.

    Raises:
        Unavailable: it is not installed.
    """
    if importlib.util.find_spec(library) is None:
        raise Unavailable(f"{library} is not installed")
    return importlib.import_module(library)


def import_torchvision() -> None:
    """Import torchvision, also beside a torch that its compiled part was not built for.

    Its Python part, which is all that is wanted, loads once the two operators are declared that it asks for.
    """
    try:
        needed("torchvision")
    except RuntimeError:  # operator torchvision::nms does not exist
        for name in ("nms", "qnms"):
            torch.library.define(
                f"torchvision::{name}", "(Tensor boxes, Tensor scores, float overlap) -> Tensor"
            )
        needed("torchvision")


def transformers() -> Any:
    """The transformers library, which imports torchvision where that is installed."""
    with suppress(Unavailable):
        import_torchvision()
    return needed("transformers")


def _torchvision_model(name: str) -> nn.Module:
    import_torchvision()
    make = getattr(importlib.import_module("torchvision.models"), name)
    model: nn.Module = make(weights=None)
    return model


def vgg11() -> nn.Module:
    return _torchvision_model("vgg11")


def resnet50() -> nn.Module:
    return _torchvision_model("resnet50")


class LanguageModel(nn.Module):
    """From embedded tokens to the logits of the next one, by a causal model of the transformers library."""

    def __init__(self, causal: nn.Module) -> None:
        super().__init__()
        self.causal = causal

    def forward(self, embedded: Tensor) -> Tensor:
        states = self.causal.base_model(inputs_embeds=embedded, use_cache=False).last_hidden_state
        logits: Tensor = self.causal.lm_head(states[:, -1])
        return logits


def hf_gpt2() -> nn.Module:
    library = transformers()
    config = library.GPT2Config(n_layer=6, n_embd=768, n_head=12)
    return LanguageModel(library.GPT2LMHeadModel(config))


def hf_llama() -> nn.Module:
    library = transformers()
    config = library.LlamaConfig(
        vocab_size=32_000,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    return LanguageModel(library.LlamaForCausalLM(config))
