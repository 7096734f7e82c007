"""Inputs that a model refused, made as its message asks for: sizes, numbers of tokens, ids that it knows."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from benchmarks.supported.inputs import BATCH, Reads
from benchmarks.supported.values import number

__all__ = ["repaired"]

MULTIPLIED = re.compile(r"shapes cannot be multiplied \(\d+x(\d+) and (\d+)x\d+\)")
NORMALISED = re.compile(r"normalized_shape=\[(\d+)\].*got input of size\[(?:\d+, )*(\d+)\]")
CHANNELS = re.compile(r"to have (\d+) channels, but got (\d+) channels")
MATCHED = re.compile(r"size of tensor a \((\d+)\) must match the size of tensor b \((\d+)\)")
CONCATENATED = re.compile(r"Expected size (\d+) but got size (\d+)")
COUNTED = re.compile(r"tokens: ?(\d+).*features: ?(?:torch\.Size\(\[)?(\d+)")


def repaired(model: nn.Module, reads: Reads, message: str) -> Iterator[Reads]:
    """Other inputs for a model that says this of the ones that it was given, most likely first."""
    for pattern, wants_first in ((MULTIPLIED, False), (NORMALISED, True), (CHANNELS, True)):
        for first, second in pattern.findall(message)[:1]:
            want, got = (first, second) if wants_first else (second, first)
            yield from _resized(reads, int(got), int(want))
            if pattern is CHANNELS:  # of what has no rows and columns
                flat = {k: v for k, v in reads.values.items() if v.dim() == 3 and v.is_floating_point()}
                yield from (_changed(reads, {k: torch.randn(BATCH, int(want), 64, 64)}) for k in flat)
    for pattern in (MATCHED, CONCATENATED):
        for first, second in pattern.findall(message)[:1]:
            yield from _resized(reads, int(first), int(second))
            yield from _resized(reads, int(second), int(first))
    for tokens, features in COUNTED.findall(message)[:1]:
        yield from _with_tokens(model, reads, int(tokens), int(features))
    if "index out of range" in message:
        yield _changed(reads, {k: v % 2 for k, v in reads.values.items() if not v.is_floating_point()})


def _changed(reads: Reads, values: dict[str, Tensor]) -> Reads:
    return replace(reads, values=reads.values | values)


def _resized(reads: Reads, got: int, want: int) -> Iterator[Reads]:
    """One axis at a time, from the last one, of one input that is as long as what was got."""
    for name, value in reads.values.items():
        for axis in reversed(range(1, value.dim())):
            if value.shape[axis] == got and 0 < want <= 4096:
                yield _changed(reads, {name: _of_length(value, axis, want)})


def _of_length(value: Tensor, axis: int, length: int) -> Tensor:
    """The first of it, or all of it several times."""
    times = -(-length // value.shape[axis])
    return torch.cat([value] * times, axis).narrow(axis, 0, length)


def _with_tokens(model: nn.Module, reads: Reads, tokens: int, features: int) -> Iterator[Reads]:
    """With as many tokens in the text that stand for what is seen or heard as there are features."""
    ids = reads.values.get("input_ids")
    if ids is None:
        return
    for names in ("image_token_id image_token_index", "audio_token_id audio_token_index", "video_token_id"):
        token = number(model, names, -1)
        each = features // BATCH
        if token >= 0 and 0 < each <= 4096:
            text = torch.where(ids == token, token + 1, ids)
            longer = torch.cat([text.new_full((BATCH, each), token), text], 1)
            given: dict[str, Tensor] = {"input_ids": longer}
            for name in ("attention_mask", "token_type_ids", "mm_token_type_ids"):
                if name in reads.values:
                    given[name] = torch.ones_like(longer)
            yield _changed(reads, given)
