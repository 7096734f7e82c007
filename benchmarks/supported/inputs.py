"""What a model reads, made from the signature of its forward pass: sets of inputs, to be tried in turn."""

from __future__ import annotations

import inspect
import re
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice, product
from typing import Any

from torch import Tensor, nn

from benchmarks.supported.values import BATCH, embeddings, maker, makes

__all__ = ["BATCH", "Reads", "candidates"]

MOST, SETS = 24, 40
"""How many values for one set of arguments, and how many sets, are tried at most."""
SEEN = ("pixel_values", "input_features", "input_values", "pixel_values_videos", "audio_values")
TEXT = ("inputs_embeds", "decoder_inputs_embeds")
IDS = ("input_ids", "decoder_input_ids")
BESIDES = (
    "attention_mask", "input_features_mask", "feature_attention_mask", "bbox", "encoder_hidden_states",
    "image_grid_thw", "position_ids", "cross_attention_states", "patch_embeds", "decoder_input_ids",
    "input_ids", "pixel_values", "input_features", "pixel_mask", "feature_lens", "spatial_shapes",
    "pixel_attention_mask", "actions", "returns_to_go", "timesteps",
)  # fmt: skip
"""What may be missing where a model stumbles over nothing."""


@dataclass(frozen=True)
class Reads:
    """What a model is run on.

    Attributes:
        values: by keyword.
        sources: paths of modules that embed tokens, whose outputs get relevance where no input is a number.
        fixed: what is no tensor, by keyword.
    """

    values: dict[str, Tensor]
    sources: tuple[str, ...] = ()
    fixed: dict[str, Any] = field(default_factory=dict)


def candidates(model: nn.Module, said: Sequence[str]) -> Iterator[Reads]:
    """Sets of inputs, from what is most likely right; ``said`` grows by what the model says of each."""
    parameters = inspect.signature(model.forward).parameters
    names = [n for n, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    required = [n for n in names if parameters[n].default is inspect.Parameter.empty]
    left, seen = deque(_sets(model, names, required)), set()
    while left and len(seen) < SETS:
        chosen = left.popleft()
        options = [maker(name)(model) for name in chosen]
        if frozenset(chosen) in seen or not all(options):
            continue
        seen.add(frozenset(chosen))
        before = len(said)
        for values in islice(_choices(options), MOST):
            yield _reads(model, dict(zip(chosen, values, strict=True)))
        for message in list(dict.fromkeys(said[before:]))[:4]:
            left.extendleft(reversed(list(_extended(chosen, names, message))))


def _choices(options: list[list[Any]]) -> Iterator[tuple[Any, ...]]:
    """One of the values for each argument: first the like of each, as images of one size are, then each with each."""
    yield from zip(*options, strict=False)
    yield from product(*options)


def _reads(model: nn.Module, given: dict[str, Any]) -> Reads:
    tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    fixed = {name: value for name, value in given.items() if not isinstance(value, Tensor)}
    floating = any(value.is_floating_point() for value in tensors.values())
    return Reads(tensors, () if floating else embeddings(model), fixed)


def _extended(chosen: list[str], names: list[str], message: str) -> Iterator[list[str]]:
    """More arguments: those that the message names, or else, where it names nothing, one that may be missing."""
    able = [name for name in names if makes(name) and name not in chosen]
    named = [name for name in able if re.search(rf"\b{name}\b", message)]
    if named:
        yield [*chosen, *named]
        for name in named:
            yield [*chosen, name]
    elif "NoneType" in message:
        more = [name for name in BESIDES if name in able]
        for name in more:
            yield [*chosen, name]
        if more:
            yield [*chosen, *(name for name in more if not (name in IDS and "inputs_embeds" in chosen))]


def _sets(model: nn.Module, names: list[str], required: list[str]) -> Iterator[list[str]]:
    """Which arguments are given."""
    main = getattr(model, "main_input_name", "input_ids")
    text = [n for n in TEXT if n in names] if "inputs_embeds" in names else [n for n in IDS if n in names]
    ids = [n for n in IDS if n in names]
    seen = [n for n in SEEN if n in names]
    replaced = IDS if "inputs_embeds" in text and not set(IDS) & set(required) else ()
    others = [n for n in required if n not in (*text, *seen, *replaced)]
    if main in names and main not in (*IDS, *TEXT):
        needed = [n for n in required if n not in text]
        yield [
            main,
            *(n for n in text if n.startswith("decoder")),
            *needed,
            *(n for n in IDS if n in required),
        ]
        yield [main, *required]
        if "input_ids" in names:
            yield [main, "input_ids", *required]
    if text:
        yield [*text, *others]
    for name in seen:
        yield [name, *required]
    if ids:
        yield [*ids, *required]
        yield [*ids[:1], *required]
    for name in seen:
        yield [*text, name, *others]
        yield [*ids, name, *required]
        yield [*ids[:1], name, *required]
    yield [*ids, *seen, *required]
    yield list(required)
