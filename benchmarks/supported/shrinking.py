"""Configurations of the transformers library made small, by the names of what they hold and not by model.

A configuration is a tree of numbers. What a number counts is told by its name (layers, heads, widths, pixels, tokens),
and a small one takes its place. Ways of shrinking are tried in turn, from the smallest: all widths equal, then all
divided by the same number, so that ratios that a model relies on are kept.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.supported.special import CHANGES

__all__ = ["WAYS", "Way", "parts", "shrunk"]

LAYERS, HEADS, KEYS, HEAD, WIDE, VOCABULARY, POSITIONS, EXPERTS, FRAMES = 2, 4, 2, 16, 64, 128, 512, 4, 64
IMAGE, PATCH, CHUNK = 32, 8, 8


@dataclass(frozen=True)
class Way:
    """A way of shrinking.

    Attributes:
        name: what it is called in the results.
        divisor: what widths are divided by, or 0 where all are made equal.
        fills: whether what is open is filled in.
        whole: whether lists of layers keep their length.
        image: pixels of the side of an image, or 0 where it is left as it is.
    """

    name: str
    divisor: int = 0
    fills: bool = False
    image: int = IMAGE
    whole: bool = False


WAYS = (
    Way("equal"),
    Way("equal, filled", fills=True),
    Way("sixteenth", 16),
    Way("equal, larger images", image=64),
    Way("eighth", 8),
    Way("sixteenth, larger images", 16, 64),
    Way("quarter", 4, 64),
    Way("few layers", 1, 64),
    Way("sixteenth, whole images", 16, 0),
    Way("eighth, all layers", 8, 64, whole=True),
    Way("sixteenth, all layers, whole images", 16, 0, whole=True),
)


def _named(*patterns: str) -> Callable[[str], bool]:
    found = re.compile("|".join(f"(?:{pattern})" for pattern in patterns))
    return lambda name: found.fullmatch(name) is not None


counts_layers = _named(
    r"(?!.*(adapter|conv_layers|cross_layers|dense_layers|residual_layers|encode_proj|mlp_only|skip|every|window_layers|global|interaction|_idx|index|interval|kv_shared|feature_layer|vision_layer|select))(.*_)?(num_)?(n_)?(hidden_)?layers?",
    r"(?!.*(iou|attention|index))(.*_)?(depth|depths|n_layer|num_blocks|blocks|num_hidden_layers|num_layers|blocks_per_stage)",
    r"resampler_depth|num_block_repeats|layers_per_block|stage_num_blocks",
)
counts_keys = _named(r".*(key_value_heads|kv_heads|num_key_heads|multi_query_group_num|n_head_kv|kv_n_heads)")
counts_heads = _named(r".*(attention_heads|num_heads|n_heads|n_head|heads|num_value_heads)", r"heads")
is_head = _named(
    r".*(head_dim|kv_channels|d_kv|d_head|head_size|qk_rope_head_dim|qk_nope_head_dim|v_head_dim|key_dim|value_dim)"
)
counts_tokens = _named(
    r"(?!type_|.*type_vocab)(.*_)?vocab(ulary)?(_size)?(_per_layer_input)?", r".*codebook_size|n_vocab"
)
is_token = _named(r".*(token_id|token_index|_token)s?")
counts_positions = _named(
    r"(.*_)?max_(position|source_position|target_position)(_embedding)?s?|n_positions|n_ctx|max_seq_len(gth)?|context_length"
)
counts_experts = _named(r"(moe_)?(num_|n_)?(local_|routed_|total_)?experts|ffn_num_experts|moe_num_experts")
counts_chosen = _named(
    r"num_experts_per_tok(en)?|moe_top_?k|top_?k|num_experts_per_token|experts_per_token|moe_k|router_top_k"
)
is_group = _named(r"n_group|topk_group|num_expert_groups?")
is_side = _named(
    r"(.*_)?(image_size|input_size|img_size|pretrain_image_size|input_resolution|spec_size|image_resolution)"
)
is_patch = _named(r"patch_size|spatial_patch_size|vision_patch_size")
FEW = {"num_windows": 4, "num_queries": 8, "two_stage_num_proposals": 8, "num_denoising": 0}
is_chunk = _named(r"(mamba_|ssm_|ssd_)?chunk_size")
is_wide = _named(
    r"(?!.*(temporal|spatial|kernel|patch|window|image|sampl|chunk|block|stride|vocab|max_|batch|codebook_size|tubelet|crop|tile|grid|merge|pool_size|context_size|buckets|group_size|memory_size|bin|num_channels|in_channels_audio|audio_channels|mel|state_size|region|type_))"
    r"(.*_)?(hidden|hidden_size|hidden_sizes|size|dim|dims|d_model|n_embd|embd|n_inner|d_inner|inner|ffn|width|widths|channels|channel|rank|filters|features_size|d_ff|intermediate_size(_mlp)?|embed_dim|in_features|proj|units|hidden_act_dim|dim_per_stage|upsample_groups)",
    r"upsample_groups|(.*_)?(hidden_size|intermediate_size|embed_dim|embedding_size|ffn_dim|channels|projection_dim|hidden_dim)(_.*)?",
)


def _fit(name: str, value: Any, way: Way) -> Any:
    """What takes the place of a number, or of each number of a list; the value itself where it stays."""
    if isinstance(value, bool):
        return value
    if isinstance(value, list | tuple):
        if not value or not all(
            isinstance(each, int | list | tuple) and not isinstance(each, bool) for each in value
        ):
            return value
        if counts_layers(name):
            return type(value)(each if way.whole else min(each, 1) for each in value)
        if is_side(name):
            return type(value)(_fit(name, each, way) for each in value)
        if is_wide(name):
            divisor = way.divisor or 16
            return type(value)(_divided(each, divisor) if isinstance(each, int) else each for each in value)
        return value
    if not isinstance(value, int):
        return value
    if is_token(name):
        return value if 0 <= value < VOCABULARY else value if value < 0 else 3 + sum(map(ord, name)) % 90
    if counts_tokens(name):
        return min(value, VOCABULARY)
    if is_chunk(name) and value >= 16:
        return CHUNK
    if name in FEW:
        return min(value, FEW[name])
    if counts_positions(name):
        return min(value, FRAMES // 2 if "source" in name else POSITIONS)
    if counts_layers(name):
        return value if way.whole else min(value, LAYERS)
    if counts_experts(name):
        return min(value, EXPERTS)
    if counts_chosen(name):
        return min(value, 2)
    if is_group(name):
        return min(value, 1)
    if is_side(name):
        return min(value, way.image) if way.image and value >= 32 else value
    if is_patch(name):
        return PATCH if way.image and value > PATCH else value
    return _width(name, value, way)


def _width(name: str, value: int, way: Way) -> int:
    if way.divisor:
        wide = is_head(name) or is_wide(name)
        return _divided(value, way.divisor) if wide and value >= 16 else value
    if counts_keys(name):
        return min(value, KEYS)
    if counts_heads(name):
        return min(value, HEADS)
    if is_head(name):
        return min(value, HEAD)
    return min(value, WIDE) if is_wide(name) else value


def _divided(value: Any, divisor: int) -> Any:
    if not isinstance(value, int):
        return value
    return max(value // divisor, 2) if value >= 16 else value


def shrunk(cls: type, way: Way) -> Any:
    """A small configuration of a class: what it holds by default, each number in its place made small."""
    return cls(**_overrides(cls(), way))


def parts(config: Any) -> list[Any]:
    """A configuration and all that it consists of."""
    found, left = [], [config]
    while left:
        found.append(left.pop(0))
        left += [value for value in vars(found[-1]).values() if hasattr(value, "model_type")]
    return found


def _overrides(config: Any, way: Way) -> dict[str, Any]:
    """What a configuration is given to be small, without what it works out by itself from that."""
    found: dict[str, Any] = {}
    values = dict(vars(config))
    declared = {field.name for field in dataclasses.fields(config)}
    depth = next((values[k] for k in DEPTHS if k in declared and isinstance(values.get(k), int)), 0)
    turns = "mrope_section" in _source(type(config))
    for name, value, default in _fields(config):
        if value is None and way.fills and name in FILLED:
            found[name] = FILLED[name]
            continue
        if (
            name == "rope_parameters"
            and turns
            and "rope_type" in (value or {})
            and "num_attention_heads" in values
        ):
            found[name] = {**value, "mrope_section": _sections(config, way)}
            continue
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            found[name] = _part(value, way)
            continue
        if default is None and not isinstance(value, int):
            if isinstance(value, list | tuple) and name in (
                "layer_types",
                "mlp_layer_types",
                "layers_block_type",
            ):
                found[name] = _kinds(value, LAYERS) if not way.whole else value
            elif isinstance(value, list | tuple | dict):
                small = _nested(name, value, way)
                if small != value:
                    found[name] = small
            continue
        if isinstance(value, list | tuple) and depth > LAYERS and len(value) == depth and not way.whole:
            found[name] = _kinds(value, LAYERS)
            continue
        small = _nested(name, value, way)
        if name == "max_length" and "num_mel_bins" in values:  # of a spectrum
            small = min(value, FRAMES)
        if small != value:
            found[name] = small
    keys, heads = "num_key_value_heads", "num_attention_heads"
    if keys in found and values.get(keys) == values.get(heads):
        found[keys] = found.get(heads, values[heads])
    return found | CHANGES.get(config.model_type, {})


def _part(config: Any, way: Way) -> Any:
    """A small configuration of what is a part of another: it may hold other values than its class has by default."""
    if config.model_type in IN_PLACE:
        return IN_PLACE[config.model_type](config)
    usual = vars(type(config)())
    kept = {
        name: value
        for name, value, _ in _fields(config)
        if not hasattr(value, "model_type") and (name not in usual or not _same(usual[name], value))
    }
    given = kept | _overrides(config, way)
    outputs = vars(config).get("_out_indices")
    if outputs is None or outputs == usual.get("_out_indices"):
        return type(config)(**given)
    if max(outputs) >= len(type(config)(**given).stage_names):  # layers, of which there are fewer now
        given["num_hidden_layers"] = len(outputs)
        outputs = list(range(1, len(outputs) + 1))
    return type(config)(**given | {"out_indices": outputs})


def _same(a: Any, b: Any) -> bool:
    return bool(a == b)


def _timm(config: Any) -> Any:
    """The smallest model of timm that has stages, in the place of what is named."""
    return type(config)(backbone="test_resnet", out_indices=config.out_indices, out_features=None)


def _wrapped(config: Any) -> Any:
    if (config.model_args or {}).get("features_only"):
        return type(config)(architecture="test_resnet", do_pooling=False, model_args=config.model_args)
    given = {"hidden_size": WIDE, "model_args": {"embed_dim": WIDE}}
    return type(config)(architecture="test_vit", do_pooling=False, **given)


DEPTHS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
IN_PLACE: dict[str, Callable[[Any], Any]] = {"timm_backbone": _timm, "timm_wrapper": _wrapped}
FILLED = {
    "head_dim": HEAD,
    "num_key_value_heads": HEADS,
    "n_routed_experts": EXPERTS,
    "num_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "vocab_size": VOCABULARY,
    "moe_intermediate_size": WIDE,
    "top_k_experts": 2,
    "prediction_length": 8,
    "num_frames": 2,
    "initializer_range": 0.02,
    "hidden_size_per_layer_input": 0,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}
"""For what a configuration leaves open and a model cannot do without."""


def _nested(name: str, value: Any, way: Way) -> Any:
    if isinstance(value, dict):
        return value
    return _fit(name, value, way)


def _sections(config: Any, way: Way) -> list[int]:
    """Of the half of a head, what turns with time, height and width."""
    head = HEAD
    if way.divisor:
        values = vars(config)
        head = _divided(
            values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"], way.divisor
        )
    rest = head // 2 - head // 8
    return [head // 8, rest // 2, rest - rest // 2]


@cache
def _source(cls: type) -> str:
    """The text of the file of models that belongs to a class of configurations."""
    file = Path(inspect.getsourcefile(cls) or "")
    models = file.with_name(file.name.replace("configuration_", "modeling_"))
    return models.read_text() if models.exists() else ""


def _kinds(values: Any, length: int) -> Any:
    """The first layers, and among them one of each kind, as far as they go."""
    kinds = list(dict.fromkeys(map(_hashable, values)))
    firsts = [next(v for v in values if _hashable(v) == kind) for kind in kinds]
    return type(values)((firsts * length)[:length]) if len(kinds) > 1 else type(values)(values[:length])


def _hashable(value: Any) -> Any:
    return tuple(map(_hashable, value)) if isinstance(value, list | tuple) else value


def _fields(config: Any) -> Iterator[tuple[str, Any, Any]]:
    """Name, value and declared default of what a configuration is made of."""
    values = vars(config)
    for field in dataclasses.fields(config):
        if field.name in values and field.name not in COMMON:
            yield field.name, values[field.name], field.default


COMMON = frozenset(
    {
        "transformers_version", "architectures", "output_hidden_states", "return_dict", "dtype",
        "chunk_size_feed_forward", "is_encoder_decoder", "id2label", "label2id", "problem_type",
        "output_attentions",
    }
)  # fmt: skip
