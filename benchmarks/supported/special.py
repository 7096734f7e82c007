"""What the names of a configuration do not tell: what some types are given besides."""

from __future__ import annotations

from typing import Any

__all__ = ["CHANGES"]

EFFICIENT = {
    "in_channels": [32, 16],
    "out_channels": [16, 24],
    "kernel_sizes": [3, 3],
    "strides": [1, 2],
    "num_block_repeats": [1, 1],
    "expand_ratios": [1, 2],
    "hidden_dim": 320,
    "width_coefficient": 0.25,
    "depth_coefficient": 1.0,
    "depthwise_padding": [],
    "image_size": 32,
}
ROTARY = {"rope_type": "default", "rope_theta": 10000.0}
CHANGES: dict[str, dict[str, Any]] = {
    "align_text_model": {"hidden_size": 320, "num_attention_heads": 4},
    "align_vision_model": EFFICIENT,
    "autoformer": {"prediction_length": 8, "context_length": 16},
    "chameleon": {"vocabulary_map": {"<image>": 5}},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROTARY, "sliding_attention": ROTARY}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"]},
    "efficientnet": EFFICIENT,
    "dots3_note_audio_encoder": {"adapter_input_size": 64},
    "emu3": {"vocabulary_map": {"<image>": 5}},
    "informer": {"prediction_length": 8, "context_length": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "time_series_transformer": {"prediction_length": 8, "context_length": 16},
}
