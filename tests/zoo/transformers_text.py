"""Architectures of the transformers library that read text."""

from __future__ import annotations

from typing import Any

from .transformers_case import SEQ2SEQ, TEXT, TOKENS, VOCABULARY, Case

__all__ = ["CASES"]


def _reads(source: str, model: str, *bases: dict[str, Any], **more: Any) -> Case:
    config: dict[str, Any] = {}
    for base in (*bases, more):
        config |= base
    return Case(model, config, sources=(source,))


GROUPED = {**TEXT, "num_key_value_heads": 1}
GPT = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "vocab_size": VOCABULARY}
BLOOM = {"vocab_size": VOCABULARY, "hidden_size": 16, "n_layer": 2, "n_head": 2}
MPT = {"vocab_size": VOCABULARY, "d_model": 16, "n_heads": 2, "n_layers": 2, "max_seq_len": 32}
NEO = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 24, "window_size": 4}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
FEW = {"num_local_experts": 4, "num_experts_per_tok": 2}
HEAD = {"head_dim": 8}
WINDOW = {"sliding_window": 4}
WTE, EMBED = "transformer.wte", "model.embed_tokens"

DECODERS = (
    _reads(WTE, "GPT2LMHeadModel", GPT),
    _reads("transformer.tokens_embed", "OpenAIGPTLMHeadModel", GPT),
    _reads(WTE, "GPTBigCodeForCausalLM", GPT),
    _reads(WTE, "GPTJForCausalLM", GPT, rotary_dim=4),
    _reads(WTE, "GPTNeoForCausalLM", TOKENS, NEO, attention_types=[[["global", "local"], 1]]),
    _reads("gpt_neox.embed_in", "GPTNeoXForCausalLM", TEXT),
    _reads(WTE, "CodeGenForCausalLM", GPT, n_head=4, rotary_dim=4),
    _reads("model.decoder.embed_tokens", "OPTForCausalLM", TEXT, ffn_dim=24, word_embed_proj_dim=16),
    _reads("transformer.word_embeddings", "BloomForCausalLM", BLOOM),
    _reads("transformer.word_embeddings", "FalconForCausalLM", TEXT),
    _reads(WTE, "MptForCausalLM", MPT),
    _reads("biogpt.embed_tokens", "BioGptForCausalLM", TEXT),
    _reads(EMBED, "LlamaForCausalLM", GROUPED),
    _reads(EMBED, "MistralForCausalLM", GROUPED, WINDOW),
    _reads(EMBED, "MixtralForCausalLM", GROUPED, num_local_experts=4),
    _reads(EMBED, "Qwen2ForCausalLM", GROUPED),
    _reads(EMBED, "Qwen3ForCausalLM", GROUPED, HEAD),
    _reads(EMBED, "Qwen2MoeForCausalLM", GROUPED, MOE, shared_expert_intermediate_size=24),
    _reads(EMBED, "Qwen3MoeForCausalLM", GROUPED, MOE, HEAD),
    _reads(EMBED, "GemmaForCausalLM", GROUPED, HEAD),
    _reads(EMBED, "Gemma2ForCausalLM", GROUPED, HEAD, WINDOW),
    _reads(EMBED, "Gemma3ForCausalLM", GROUPED, HEAD, WINDOW),
    _reads(EMBED, "PhiForCausalLM", TEXT),
    _reads(EMBED, "Phi3ForCausalLM", GROUPED),
    _reads(EMBED, "PhimoeForCausalLM", GROUPED, num_local_experts=4),
    _reads(EMBED, "OlmoForCausalLM", GROUPED),
    _reads(EMBED, "Olmo2ForCausalLM", GROUPED),
    _reads(EMBED, "OlmoeForCausalLM", GROUPED, num_experts=4, num_experts_per_tok=2),
    _reads(EMBED, "GraniteForCausalLM", GROUPED),
    _reads(EMBED, "GraniteMoeForCausalLM", GROUPED, FEW),
    _reads(EMBED, "StableLmForCausalLM", GROUPED),
    _reads(EMBED, "Starcoder2ForCausalLM", GROUPED),
    _reads(EMBED, "CohereForCausalLM", GROUPED),
    _reads(EMBED, "Cohere2ForCausalLM", GROUPED, WINDOW),
    _reads(EMBED, "GlmForCausalLM", GROUPED, HEAD),
    _reads(EMBED, "PersimmonForCausalLM", TEXT),
    _reads(EMBED, "NemotronForCausalLM", GROUPED),
    _reads(EMBED, "JetMoeForCausalLM", GROUPED, FEW, kv_channels=8),
)

STATE = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}
MAMBA2 = {"num_heads": 4, "head_dim": 8, "n_groups": 1, "chunk_size": 4}
HYBRID = {"mamba_d_state": 4, "use_mamba_kernels": False, "attn_layer_period": 2, "attn_layer_offset": 1}
BAMBA = {"mamba_d_state": 4, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_chunk_size": 4}
ZAMBA = {"num_hidden_layers": 3, "n_mamba_heads": 2, "num_key_value_heads": 2}
RWKV = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "context_length": 32}
GRIFFIN = {"num_hidden_layers": 3, "lru_width": 16, "attention_window_size": 4, "use_cache": False}

STATE_SPACE = (
    _reads("backbone.embeddings", "MambaForCausalLM", STATE),
    _reads("backbone.embeddings", "FalconMambaForCausalLM", STATE),
    _reads("backbone.embeddings", "Mamba2ForCausalLM", STATE, MAMBA2),
    _reads("rwkv.embeddings", "RwkvForCausalLM", RWKV),
    _reads(EMBED, "RecurrentGemmaForCausalLM", GROUPED, GRIFFIN),
    _reads(EMBED, "JambaForCausalLM", GROUPED, HYBRID, num_experts=2),
    _reads(EMBED, "ZambaForCausalLM", TEXT, HYBRID, ZAMBA),
    _reads(EMBED, "BambaForCausalLM", GROUPED, BAMBA, attn_layer_indices=[1]),
)

NARROW, EVEN = {**TEXT, "embedding_size": 12}, {**TEXT, "embedding_size": 16}
DISTIL = {**TOKENS, "dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2}
DEBERTA = {**TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "max_relative_positions": 8}
PARTS = ("q", "k", "v", "post_attention", "intermediate", "output")
SQUEEZE = {**EVEN, **{f"{part}_groups": 2 for part in PARTS}}
NYSTROM = {**TEXT, "num_landmarks": 2, "segment_means_seq_len": 6, "conv_kernel_size": 3}
XLNET = {"vocab_size": VOCABULARY, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24}
XLM = {"emb_dim": 16, "n_layers": 2, "n_heads": 2, "n_langs": 1}
FUNNEL = {
    "block_sizes": [1, 1],
    "num_decoder_layers": 1,
    "d_model": 16,
    "n_head": 2,
    "d_head": 8,
    "d_inner": 24,
}


def _encodes(path: str, name: str, *bases: dict[str, Any], **more: Any) -> Case:
    return _reads(f"{path}.embeddings.word_embeddings", f"{name}ForSequenceClassification", *bases, **more)


ENCODERS = (
    _encodes("bert", "Bert", TEXT),
    _encodes("roberta", "Roberta", TEXT),
    _encodes("roberta", "Camembert", TEXT),
    _encodes("roberta", "XLMRoberta", TEXT),
    _encodes("distilbert", "DistilBert", DISTIL),
    _encodes("electra", "Electra", NARROW),
    _encodes("albert", "Albert", NARROW),
    _encodes("mpnet", "MPNet", TEXT),
    _encodes("deberta", "Deberta", DEBERTA),
    _encodes("deberta", "DebertaV2", DEBERTA),
    _encodes("mobilebert", "MobileBert", EVEN, intra_bottleneck_size=16),
    _encodes("transformer", "SqueezeBert", SQUEEZE),
    _encodes("convbert", "ConvBert", EVEN, conv_kernel_size=3, head_ratio=1),
    _encodes("longformer", "Longformer", TEXT, attention_window=4),
    _encodes("bert", "BigBird", TEXT, attention_type="original_full"),
    _encodes("roformer", "RoFormer", EVEN),
    _encodes("nystromformer", "Nystromformer", NYSTROM),
    _encodes("yoso", "Yoso", TEXT, use_expectation=True),
    _encodes("esm", "Esm", TEXT, position_embedding_type="rotary"),
    _encodes("funnel", "Funnel", TOKENS, FUNNEL),
    _encodes("fnet", "FNet", TEXT),
    _reads(
        "model.embeddings.tok_embeddings",
        "ModernBertForSequenceClassification",
        TEXT,
        local_attention=4,
        global_attn_every_n_layers=2,
    ),
    _reads("transformer.embeddings", "XLMForSequenceClassification", TOKENS, XLM),
    Case("XLNetForSequenceClassification", XLNET, sources=("transformer.word_embedding",), batched=False),
)

T5 = {"vocab_size": VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
GATED = {**T5, "feed_forward_proj": "gated-gelu"}
PROPHET = {
    **TOKENS,
    **{f"num_{part}_{what}": 2 for part in ("encoder", "decoder") for what in ("layers", "attention_heads")},
    "hidden_size": 16,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "ngram": 2,
}

# Both texts are given as embeddings: one module embeds the two of them.
ENCODER_DECODERS = tuple(
    Case(model, config, ("inputs_embeds", "decoder_inputs_embeds"))
    for model, config in (
        ("T5ForConditionalGeneration", T5),
        ("MT5ForConditionalGeneration", GATED),
        ("LongT5ForConditionalGeneration", {**GATED, "local_radius": 2}),
        ("UMT5ForConditionalGeneration", GATED),
        ("BartForConditionalGeneration", SEQ2SEQ),
        ("PegasusForConditionalGeneration", SEQ2SEQ),
        ("MBartForConditionalGeneration", SEQ2SEQ),
        ("MarianMTModel", SEQ2SEQ),
        ("BlenderbotForConditionalGeneration", SEQ2SEQ),
        ("M2M100ForConditionalGeneration", SEQ2SEQ),
        ("ProphetNetForConditionalGeneration", PROPHET),
    )
)

CASES = (*DECODERS, *STATE_SPACE, *ENCODERS, *ENCODER_DECODERS)
"""One for each architecture."""
