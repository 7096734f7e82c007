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
SWIN = {"patch_size": 4, "embed_dim": 8, "depths": [1] * 4, "num_heads": [2] * 4, "window_size": 4}
ROTARY = {"rope_type": "default", "rope_theta": 10000.0}
CHANGES: dict[str, dict[str, Any]] = {
    "align_text_model": {"hidden_size": 320, "num_attention_heads": 4},
    "align_vision_model": EFFICIENT,
    "blip-2": {"image_token_index": 99},
    "instructblip": {"image_token_index": 99},
    "instructblipvideo": {"video_token_index": 99},
    "depth_pro": {"patch_size": 32, "intermediate_hook_ids": [1, 0]},
    "clap_audio_model": {"hidden_size": 128},
    "donut-swin": SWIN,
    "edgetam_vision_model": {"backbone_channel_list": [192, 48, 32, 32]},
    "granite4_vision": {"deepstack_layer_map": [[0, 0], [1, 1]]},
    "molmo2_adapter": {"vision_feature_layer": [1, 0]},
    "perceiver": {"d_latents": 64, "num_latents": 16, "num_self_attends_per_block": 1},
    "speecht5_hifigan": {"upsample_initial_channel": 64},
    "fastspeech2_conformer_hifigan": {"upsample_initial_channel": 64},
    "qwen2_5_omni_bigvgan": {"upsample_initial_channel": 64},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma3n_vision": {"architecture": "test_resnet"},
    "mistral_large4_text": {"kv_source_layers": [0, 1]},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "musicgen_decoder": {"dropout": 0.0},
    "pix2struct_text_model": {"initializer_range": 0.02},
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 64},
    "seggpt": {"image_size": [64, 32]},
    "swin": SWIN,
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
