"""How a class of the transformers library is made tiny, run and explained."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = [
    "FRAMES",
    "LAYERS",
    "LENGTH",
    "SAMPLES",
    "SEQ2SEQ",
    "SIDE",
    "TEXT",
    "TOKENS",
    "VOCABULARY",
    "WIDE",
    "Case",
]

VOCABULARY, LENGTH, SIDE, SAMPLES, FRAMES = 61, 6, 32, 800, 40

LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 2}
WIDE = {"hidden_size": 16, "intermediate_size": 24}
TOKENS = {"vocab_size": VOCABULARY, "max_position_embeddings": 32, "pad_token_id": 0}
TEXT = {**TOKENS, **LAYERS, **WIDE}
SEQ2SEQ = {
    **TOKENS,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "num_hidden_layers": 2,
    "decoder_start_token_id": 0,
}


@dataclass(frozen=True)
class Case:
    """A class of the library and how it is explained.

    Attributes:
        model: the name of the class.
        config: what its configuration is given.
        reads: which inputs it reads.
        sources: paths of the modules that embed tokens, which get relevance in place of the inputs.
        output: the entry of its output that is explained.
        batched: whether it embeds tokens along the first axis.
    """

    model: str
    config: dict[str, Any] = field(hash=False)
    reads: tuple[str, ...] = ("input_ids",)
    sources: tuple[str, ...] = ()
    output: str = "logits"
    batched: bool = True

    @property
    def id(self) -> str:
        """Its name among the tests: a class is explained in several ways if it reads several things."""
        floating = any(key.endswith(("values", "features")) for key in self.reads)
        return f"{self.model}, of text" if self.sources and floating else self.model
