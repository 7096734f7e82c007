"""Architectures of the transformers library that see, or hear."""

from __future__ import annotations

from typing import Any

from .transformers_case import FRAMES, LAYERS, SEQ2SEQ, SIDE, TEXT, VOCABULARY, WIDE, Case

__all__ = ["CASES"]


def _sees(name: str, *bases: dict[str, Any], **more: Any) -> Case:
    config: dict[str, Any] = {"image_size": SIDE}
    for base in (*bases, more):
        config |= base
    return Case(f"{name}ForImageClassification", config, ("pixel_values",))


VIT = {"image_size": SIDE, "patch_size": 8, **LAYERS, **WIDE}
SWIN = {"patch_size": 4, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4}
STAGES = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 8, 16, 16], "num_stages": 4}
STEM = {**STAGES, "embedding_size": 8}
TWO = {"depths": [1, 1], "hidden_sizes": [8, 16], "num_encoder_blocks": 2, "strides": [4, 2]}
PYRAMID = {**TWO, "num_attention_heads": [1, 2], "sr_ratios": [2, 1], "mlp_ratios": [2, 2]}
MOBILE = {"depth_multiplier": 0.25, "min_depth": 4}
EFFICIENT = {
    "in_channels": [32, 16],
    "out_channels": [16, 24],
    "kernel_sizes": [3, 3],
    "strides": [1, 2],
    "num_block_repeats": [1, 1],
    "expand_ratios": [1, 2],
    "hidden_dim": 128,
    "width_coefficient": 0.1,
    "depth_coefficient": 1.0,
}
MOBILE_VIT = {"hidden_sizes": [8, 12, 16], "neck_hidden_sizes": [4, 4, 8, 8, 12, 12, 16], **LAYERS}
MOBILE_VIT2 = {"width_multiplier": 0.125, "n_attn_blocks": [1, 1, 1]}
LEVIT = {
    "hidden_sizes": [8, 16, 16],
    "num_attention_heads": [2, 2, 2],
    "depths": [1, 1, 1],
    "key_dim": [4, 4, 4],
}
CVT = {"embed_dim": [8, 8, 16], "num_heads": [1, 1, 2], "depth": [1, 2, 3], "mlp_ratio": [2.0, 2.0, 2.0]}
FOCAL = {"embed_dim": 8, "focal_levels": [2, 2], "focal_windows": [3, 3]}

IMAGES = (
    _sees("ViT", VIT),
    _sees("DeiT", VIT),
    _sees("ViTMSN", VIT),
    _sees("Beit", VIT, use_relative_position_bias=True, out_indices=[0, 1]),
    _sees("Data2VecVision", VIT, use_shared_relative_position_bias=True, out_indices=[0, 1]),
    _sees("Dinov2", VIT, mlp_ratio=2),
    _sees("Dinov2WithRegisters", VIT, mlp_ratio=2),
    _sees("IJepa", VIT),
    _sees("Swin", SWIN),
    _sees("Swinv2", SWIN),
    _sees("ConvNext", STAGES),
    _sees("ConvNextV2", STAGES),
    _sees("ResNet", STEM, layer_type="basic"),
    _sees("RegNet", STEM, groups_width=4, layer_type="y"),
    _sees("Bit", STEM, num_groups=4),
    _sees("MobileNetV1", MOBILE),
    _sees("MobileNetV2", MOBILE, depth_divisible_by=4),
    _sees("EfficientNet", EFFICIENT),
    _sees("MobileViT", MOBILE_VIT, image_size=64),
    _sees("MobileViTV2", MOBILE_VIT2, image_size=64),
    _sees("Segformer", PYRAMID, patch_sizes=[7, 3], decoder_hidden_size=16),
    _sees("PoolFormer", TWO, patch_sizes=[7, 3], padding=[2, 1]),
    _sees("Pvt", PYRAMID, patch_sizes=[4, 2], sequence_reduction_ratios=[2, 1]),
    _sees("PvtV2", PYRAMID, patch_sizes=[7, 3]),
    _sees("Cvt", CVT),
    _sees("Levit", LEVIT, image_size=64),
    _sees("FocalNet", TWO, FOCAL),
    _sees("Van", TWO, patch_sizes=[7, 3], mlp_ratios=[2, 2]),
    _sees("SwiftFormer", depths=[2, 2], embed_dims=[8, 16], mlp_ratio=2, downsamples=[True, True]),
)

SPEECH = {
    **LAYERS,
    **WIDE,
    "vocab_size": VOCABULARY,
    "conv_dim": [8, 8],
    "conv_kernel": [10, 4],
    "conv_stride": [5, 4],
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "num_feat_extract_layers": 2,
    "classifier_proj_size": 8,
}
SPECTRUM = {**LAYERS, **WIDE, "patch_size": 4, "time_stride": 4, "frequency_stride": 4, "max_length": FRAMES}
WHISPER = {**SEQ2SEQ, "num_mel_bins": 8, "max_source_positions": FRAMES // 2, "max_target_positions": 16}
SPEECH2TEXT = {
    **SEQ2SEQ,
    "input_feat_per_channel": 8,
    "max_source_positions": FRAMES,
    "max_target_positions": 16,
    "conv_channels": 8,
}
HEARD, SAID = ("input_features", "decoder_input_ids"), ("model.decoder.embed_tokens",)

SOUNDS = (
    Case("Wav2Vec2ForSequenceClassification", SPEECH, ("input_values",)),
    Case("Wav2Vec2ForCTC", SPEECH, ("input_values",)),
    Case("HubertForSequenceClassification", SPEECH, ("input_values",)),
    Case("WavLMForSequenceClassification", SPEECH, ("input_values",)),
    Case("UniSpeechForSequenceClassification", SPEECH, ("input_values",)),
    Case("SEWForSequenceClassification", {**SPEECH, "squeeze_factor": 2}, ("input_values",)),
    Case(
        "Data2VecAudioForSequenceClassification", {**SPEECH, "num_conv_pos_embeddings": 2}, ("input_values",)
    ),
    Case(
        "Wav2Vec2ConformerForSequenceClassification",
        {**SPEECH, "conv_depthwise_kernel_size": 3},
        ("input_values",),
    ),
    Case("ASTForAudioClassification", {**SPECTRUM, "num_mel_bins": 8}, ("input_values",)),
    Case("WhisperForAudioClassification", {**WHISPER, "classifier_proj_size": 8}, ("input_features",)),
    Case("WhisperForConditionalGeneration", WHISPER, HEARD),
    Case("WhisperForConditionalGeneration", WHISPER, HEARD, SAID),
    Case("Speech2TextForConditionalGeneration", SPEECH2TEXT, HEARD),
)

BOTH = {
    "text_config": {**TEXT, "bos_token_id": 1, "eos_token_id": 2},
    "vision_config": VIT,
    "projection_dim": 8,
}
SEEN, READ = ("input_ids", "pixel_values"), "text_model.embeddings.token_embedding"

PAIRS = (
    Case("CLIPModel", BOTH, SEEN, (READ,), "logits_per_image"),
    Case("CLIPModel", BOTH, SEEN, (), "logits_per_image"),
    Case("SiglipModel", BOTH, SEEN, (READ,), "logits_per_image"),
    Case("SiglipModel", BOTH, SEEN, (), "logits_per_image"),
    Case("AltCLIPModel", BOTH, SEEN, (), "logits_per_image"),
    Case("ChineseCLIPModel", BOTH, SEEN, (), "logits_per_image"),
)

CASES = (*IMAGES, *SOUNDS, *PAIRS)
"""One for each architecture."""
