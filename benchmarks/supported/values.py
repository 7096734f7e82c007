"""Values for an argument of a model's forward pass, by its name."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.supported.shrinking import parts

__all__ = ["BATCH", "embeddings", "maker", "makes", "number"]

BATCH, LENGTH, SAMPLES, FRAMES, HOP, GRID = 2, 8, 1920, 64, 160, 4


def embeddings(model: nn.Module) -> tuple[str, ...]:
    """Where the model embeds tokens."""
    try:
        tokens = model.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        tokens = None
    found = {path: module for path, module in model.named_modules() if isinstance(module, nn.Embedding)}
    largest = max((module.num_embeddings for module in found.values()), default=0)
    named = [path for path in found if re.search(r"word|tok|wte|shared|vocab", path)]
    chosen = [path for path, module in found.items() if module is tokens]
    chosen = chosen or [path for path in named if "type" not in path]
    return tuple(chosen or [path for path, module in found.items() if module.num_embeddings == largest])


def of(model: nn.Module, names: str, default: Any = None) -> Any:
    """The first number, or list, that is called one of these, in the configuration or in one of those in it."""
    for config in parts(model.config):
        for name in names.split():
            value = vars(config).get(name)
            if isinstance(value, int | list | tuple) and not isinstance(value, bool) and value:
                return value
    return default


def number(model: nn.Module, names: str, default: int) -> int:
    """The same as one number: of a list the first."""
    value = of(model, names, default)
    while isinstance(value, list | tuple):
        value = value[0]
    return int(value)


def _unique(shapes: list[Any]) -> list[Any]:
    return list(dict.fromkeys(shapes))


def _normal(*shape: int) -> Callable[[nn.Module], list[Tensor]]:
    return lambda model: [torch.randn(shape)]


def _ones(*shape: int, dtype: torch.dtype = torch.long) -> Callable[[nn.Module], list[Tensor]]:
    return lambda model: [torch.ones(shape, dtype=dtype)]


def _sides(model: nn.Module) -> list[tuple[int, int]]:
    side = of(model, "image_size img_size input_size train_size", 64)
    pair = (side, side) if isinstance(side, int) else tuple(side)[-2:]
    return _unique([pair, (64, 64), (32, 32), (224, 224)])


def _channels(model: nn.Module) -> int:
    return number(model, "num_channels in_channels in_chans", 3)


def _rows(model: nn.Module) -> list[Tensor]:
    """Patches of images one below the other, or of each image."""
    side = number(model, "patch_size spatial_patch_size", 8)
    patch = 3 * side**2
    times = number(model, "temporal_patch_size", 1)
    rows = BATCH * GRID**2
    return [
        torch.randn(rows, patch * times),
        torch.randn(rows, patch),
        torch.randn(rows, 2 * patch),
        torch.randn(BATCH, GRID**2, patch),
        torch.randn(rows, 3, side, side),
        torch.randn(1, rows, 3, side, side),
        torch.randn(rows, number(model, "embed_dim hidden_size", 64)),
    ]


def _pixels(model: nn.Module) -> list[Tensor]:
    channels, frames = _channels(model), number(model, "num_frames", 0)
    images = [torch.randn(BATCH, channels, *side) for side in _sides(model)]
    films = [torch.randn(BATCH, frames or 2, channels, *side) for side in _sides(model)[:2]]
    if "grid_thw" in _arguments(model) or "spatial_shapes" in _arguments(model):
        return [*_rows(model), *images[:1]]
    many = [torch.randn(BATCH, 1, channels, *side) for side in _sides(model)[:1]]
    tiles = [
        torch.randn(BATCH, 1, number(model, "max_num_tiles", 4), channels, *side)
        for side in _sides(model)[:1]
    ]
    return [*films, *images] if frames else [*images, *films, *many, *tiles, *_rows(model)]


def _arguments(model: nn.Module) -> list[str]:
    return list(inspect.signature(model.forward).parameters)


def _film(model: nn.Module) -> list[Tensor]:
    frames = number(model, "num_frames frames_per_clip temporal_patch_size", 2)
    return [torch.randn(BATCH, frames, 3, *side) for side in _sides(model)]


MELS = (
    "num_mel_bins input_feat_per_channel feature_size num_mels n_mels mel_dim input_dim model_in_dim input_size"
    " feat_dim input_feat_size mel_bins n_mel_bins"
)


def _sound(model: nn.Module) -> list[Tensor]:
    """Spectra, ``[batch, mels, frames]`` or ``[batch, frames, mels]``."""
    mels = number(model, MELS, 80)
    limit = 2 * number(model, "max_source_positions", 0) or number(model, "max_length", 0)
    window = 2 * number(model, "n_window", 0)
    lengths = _unique([n for n in (limit, window, FRAMES, 4 * FRAMES) if 0 < n < 4000])
    found = [torch.randn(BATCH, *shape) for n in lengths for shape in ((mels, n), (n, mels))]
    side = number(model, "spec_size", 0)
    images = [torch.randn(BATCH, 1, side * side // mels, mels)] if side else []
    return [*images, *found, torch.randn(mels, BATCH * lengths[0])]


def _wave(model: nn.Module) -> list[Tensor]:
    waves = [torch.randn(BATCH, SAMPLES), torch.randn(BATCH, 1, SAMPLES)]
    spectra = _sound(model)
    return [spectra[1], *waves, *spectra] if hasattr(model.config, "num_mel_bins") else [*waves, *spectra]


def _ids(model: nn.Module) -> list[Tensor]:
    size = number(model, "vocab_size text_vocab_size", 99)
    many = number(model, "num_codebooks num_channels num_audio_channels n_codes_total", 1)
    low = min(5, size - 1)
    made = [torch.randint(low, size, (BATCH, length)) for length in (LENGTH, 4 * LENGTH)]
    return [
        *made,
        torch.randint(low, size, (BATCH, LENGTH, many)),
        torch.randint(low, size, (BATCH, many, LENGTH)),
    ]


def _boxes(model: nn.Module) -> list[Tensor]:
    corners = torch.randint(0, 20, (BATCH, LENGTH, 2))
    whole = torch.cat([corners, corners + torch.randint(1, 20, (BATCH, LENGTH, 2))], -1)
    return [whole, whole / 40, torch.cat([whole, whole], -1) / 40]


def _widths(model: nn.Module) -> list[int]:
    found = []
    try:
        tokens = model.get_input_embeddings()
        found += [tokens.embedding_dim] if isinstance(tokens, nn.Embedding) else []
    except (NotImplementedError, AttributeError):
        pass
    names = ("hidden_size", "d_model", "n_embd", "embed_dim", "dim", "hidden_dim", "encoder_hidden_size")
    return _unique([*found, *(number(model, name, 0) for name in names), 64])


def _embedded(model: nn.Module, length: int = LENGTH) -> list[Tensor]:
    return [torch.randn(BATCH, length, width) for width in _widths(model) if width]


def _hidden(model: nn.Module) -> list[Tensor]:
    return [*_rows(model), *_embedded(model)] if "grid_thw" in _arguments(model) else _embedded(model)


def _grid(model: nn.Module) -> list[Tensor]:
    return [torch.tensor([[1, GRID, GRID]] * BATCH), torch.tensor([[GRID, GRID]] * BATCH)]


def _mask_of_sound(model: nn.Module) -> list[Tensor]:
    lengths = _unique([max(value.shape[-2:]) for value in _sound(model)])
    return [torch.ones(BATCH, n, dtype=torch.long) for n in lengths] + [
        torch.ones(BATCH, n, dtype=torch.bool) for n in lengths[:1]
    ]


def _series(model: nn.Module, *extra: str) -> list[Tensor]:
    """A time series with what came before, as far back as it looks."""
    lags = of(model, "lags_sequence", [0])
    back = number(model, "context_length prediction_length", 16) + (
        max(lags) if isinstance(lags, list | tuple) else 0
    )
    many = number(model, "num_input_channels input_size", 1)
    flat, columns = torch.randn(BATCH, back), torch.randn(BATCH, back, many)
    return [columns, flat] if hasattr(model.config, "num_input_channels") else [flat, columns]


def _times(model: nn.Module) -> list[Tensor]:
    length = _series(model)[0].shape[1]
    return [torch.randn(BATCH, length, number(model, "num_time_features", 0))]


def _future(model: nn.Module, features: bool) -> list[Tensor]:
    length = number(model, "prediction_length", 8)
    return [
        torch.randn(BATCH, length, number(model, "num_time_features", 0))
        if features
        else torch.randn(BATCH, length)
    ]


def _spectrum(model: nn.Module) -> list[Tensor]:
    width = number(model, "model_in_dim num_mel_bins mel_dim", 80)
    return [torch.randn(BATCH, FRAMES, width), torch.randn(BATCH, width, FRAMES)]


def _latents(model: nn.Module) -> list[Tensor]:
    return [
        torch.randn(BATCH, *shape)
        for width in _widths(model)
        if width
        for shape in ((width, LENGTH), (LENGTH, width))
    ]


def _flattened(model: nn.Module) -> list[Tensor]:
    places = torch.randint(1, 4, (BATCH, LENGTH, 2)).to(torch.get_default_dtype())
    return [
        torch.cat([places, torch.randn(BATCH, LENGTH, number(model, "patch_embed_hidden_size", 768))], -1),
        torch.cat([places, torch.randn(BATCH, LENGTH, 3 * number(model, "patch_size", 16) ** 2)], -1),
    ]


def _states(model: nn.Module, name: str) -> list[Tensor]:
    return [torch.randn(BATCH, LENGTH, number(model, name, 1))]


def _feature_maps(model: nn.Module) -> list[Any]:
    width = _widths(model)[0]
    return [[torch.randn(BATCH, width, 4, 4)]]


MAKERS: dict[str, Callable[[nn.Module], list[Any]]] = {
    "pixel_values": _pixels,
    "image": _pixels,
    "pixel_values_videos": _film,
    "video_values": _film,
    "pixel_mask": lambda model: [torch.ones(BATCH, *_sides(model)[0], dtype=torch.long)],
    "pixel_attention_mask": lambda model: [torch.ones(BATCH, GRID**2, dtype=torch.long)],
    "spatial_shapes": lambda model: [torch.tensor([[GRID, GRID]] * BATCH)],
    "grid_thw": _grid,
    "image_grid_thw": _grid,
    "merge_sizes": lambda model: [torch.tensor([1] * BATCH)],
    "patch_embeds": _rows,
    "flattened_patches": _flattened,
    "aspect_ratio_ids": lambda model: [torch.ones(BATCH, 1, dtype=torch.long)],
    "aspect_ratio_mask": lambda model: [
        torch.ones(BATCH, 1, number(model, "max_num_tiles", 4), dtype=torch.long)
    ],
    "prompt_pixel_values": _pixels,
    "prompt_masks": _pixels,
    "pixel_position_ids": lambda model: [
        torch.stack(torch.meshgrid(*[torch.arange(GRID)] * 2, indexing="ij"), -1)
        .flatten(0, 1)
        .expand(BATCH, -1, -1)
    ],
    "input_features": _sound,
    "audio_features": _sound,
    "audio_mel": _sound,
    "mel_spectrogram": _sound,
    "spectrogram": _spectrum,
    "input_features_mask": _mask_of_sound,
    "feature_attention_mask": _mask_of_sound,
    "audio_mel_mask": lambda model: [torch.zeros(BATCH, n, dtype=torch.bool) for n in (FRAMES, 4 * FRAMES)],
    "feature_lens": lambda model: [torch.tensor([FRAMES] * BATCH)],
    "input_values": _wave,
    "audio_values": _wave,
    "waveform": _wave,
    "latents": _latents,
    "input_ids": _ids,
    "decoder_input_ids": _ids,
    "qformer_input_ids": _ids,
    "classes_input_ids": _ids,
    "tasks_input_ids": _ids,
    "attention_mask": _ones(BATCH, LENGTH),
    "classes_attention_mask": _ones(BATCH, LENGTH),
    "tasks_attention_mask": _ones(BATCH, LENGTH),
    "bbox": _boxes,
    "inputs_embeds": _embedded,
    "decoder_inputs_embeds": _embedded,
    "hidden_states": _hidden,
    "encoder_hidden_states": _embedded,
    "cross_attention_states": _embedded,
    "query_embeds": _embedded,
    "context": _embedded,
    "inputs": _embedded,
    "image_features": _embedded,
    "text_features": _embedded,
    "noise_embeds": _embedded,
    "context_hidden_states": _embedded,
    "decoder_queries": _embedded,
    "vision_features": _feature_maps,
    "vision_pos_encoding": _feature_maps,
    "position_ids": lambda model: [torch.arange(LENGTH).expand(BATCH, -1)],
    "past_values": _series,
    "past_observed_mask": lambda model: [
        torch.ones_like(value, dtype=torch.long) for value in _series(model)
    ],
    "past_values_padding": lambda model: [torch.zeros(_series(model)[0].shape[:2], dtype=torch.long)],
    "past_time_features": _times,
    "future_values": partial(_future, features=False),
    "future_time_features": partial(_future, features=True),
    "freq": lambda model: [torch.zeros(BATCH, 1, dtype=torch.long)],
    "states": partial(_states, name="state_dim"),
    "actions": partial(_states, name="act_dim"),
    "returns_to_go": lambda model: [torch.randn(BATCH, LENGTH, 1)],
    "timesteps": lambda model: [torch.arange(LENGTH).expand(BATCH, -1)],
    "num_patches": lambda model: [GRID**2],
    "visual_feats": lambda model: [torch.randn(BATCH, LENGTH, number(model, "visual_feat_dim", 64))],
    "visual_pos": lambda model: [torch.rand(BATCH, LENGTH, 4)],
    "visual_embeds": lambda model: [torch.randn(BATCH, LENGTH, number(model, "visual_embedding_dim", 64))],
    "task_inputs": lambda model: [torch.randint(5, 90, (BATCH, number(model, "task_seq_len", 77)))],
    "image1": _pixels,
    "image_attention_mask": _ones(BATCH, LENGTH, 1),
    "tgt_sizes": lambda model: [torch.tensor([[GRID, GRID]] * BATCH)],
    "target_sizes": lambda model: [torch.tensor([[GRID, GRID]] * BATCH)],
    "classes_structure": _ones(BATCH),
}
"""For each argument that is known values, the most likely first."""


ALIKE: dict[str, Callable[[nn.Module], list[Any]]] = {
    r".*pixel_values.*": _pixels,
    r".*(input_features|spectrogram)": _sound,
    r".*(input_values|waveform|audio)": _wave,
    r".*(input_ids|token_ids|type_ids|_codes)": _ids,
    r".*position_ids": lambda model: [torch.arange(LENGTH).expand(BATCH, -1)],
    r".*attention_mask|.*padding_mask|mask": _ones(BATCH, LENGTH),
    r".*sample_lengths": lambda model: [torch.tensor([FRAMES * HOP] * BATCH)],
    r".*lengths": lambda model: [torch.tensor([FRAMES] * BATCH), torch.tensor([LENGTH] * BATCH)],
    r".*(embeds|embedding|embeddings|features|hidden_states?|states|queries)": _embedded,
}
"""For arguments whose whole name says nothing, what it is like."""


def makes(name: str) -> bool:
    """Whether there are values for an argument of this name."""
    return name in MAKERS or any(re.fullmatch(pattern, name) for pattern in ALIKE)


def maker(name: str) -> Callable[[nn.Module], list[Any]]:
    """What makes values for an argument of this name: none where nothing is known of it."""
    alike = (make for pattern, make in ALIKE.items() if re.fullmatch(pattern, name))
    return MAKERS.get(name) or next(alike, lambda model: [])
