"""The small model of a type that runs, and what it runs on: the first of what is tried."""

from __future__ import annotations

import inspect
import time
import traceback
from collections import deque
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.supported.inputs import BATCH, Reads, candidates
from benchmarks.supported.making import NotBuilt, classes, settle, small
from benchmarks.supported.measuring import Subject, in_precision, leaves
from benchmarks.supported.repairing import repaired
from benchmarks.supported.shrinking import WAYS, Way

__all__ = ["Found", "find", "subject"]

PATIENCE = 40.0
"""How many seconds are spent on trying."""
CLASSES, REPAIRS = 4, 12
"""How many classes of a type, and how many repairs of one set of inputs, are tried at most."""
LARGEST = (20_000_000, 150_000_000)
"""How many weights a small model may have: if nothing is found, the larger ones are tried."""


@dataclass(frozen=True)
class Found:
    """A model that runs.

    Attributes:
        model: in double precision and evaluation mode.
        reads: what it runs on.
        way: how it was made small.
        index: which of its outputs is explained.
        shape: of that.
    """

    model: nn.Module
    reads: Reads
    way: Way
    index: int
    shape: tuple[int, ...]


def subject(model_type: str) -> tuple[Subject, dict[str, Any]]:
    """What is explained of a type, and what it is in words."""
    with in_precision(torch.float64):
        found = find(model_type)
    model, reads = found.model, found.reads
    # What single precision has too, as the weights are: its error is that of the arithmetic alone.
    values = {k: v.float().double() if v.is_floating_point() else v for k, v in reads.values.items()}

    def single() -> nn.Module:
        with in_precision(torch.float32):
            made = small(model_type, type(model), found.way, LARGEST[-1])
        for kind in ("named_parameters", "named_buffers"):
            theirs = dict(getattr(model, kind)())
            for name, tensor in getattr(made, kind)():
                tensor.data.copy_(theirs[name])
        return made

    relevant = reads.sources or [key for key, value in values.items() if value.is_floating_point()]
    told = {"model": type(model).__name__, "relevant": list(relevant), "way": found.way.name}
    batch = BATCH if found.shape and found.shape[0] == BATCH else 0
    return Subject(model, single, values, found.index, batch, reads.sources, reads.fixed), told


def first_output(outputs: Any) -> int | None:
    """Which of the tensors that a model returns is the first floating one that depends on what it read; no loss."""
    for index, value in enumerate(leaves(outputs)):
        if isinstance(value, Tensor) and value.is_floating_point() and value.requires_grad and value.dim():
            return index
    return None


def find(model_type: str) -> Found:
    """The small model of a type.

    Raises:
        NotBuilt: nothing that was tried runs, and what the first try of the last stage reached said.
    """
    reasons: list[tuple[int, str]] = []
    deadline = time.monotonic() + PATIENCE
    for largest in LARGEST:
        for cls in classes(model_type)[:CLASSES]:
            for way in WAYS:
                if time.monotonic() > deadline:
                    break
                torch.manual_seed(0)
                try:
                    model = small(model_type, cls, way, largest)
                except Exception as error:
                    reasons.append((0, _said(cls, way, error)))
                    continue
                found = _running(model, cls, way, reasons, deadline)
                if found is not None:
                    return found
        if not any("million weights" in reason for _, reason in reasons):
            break
    far = max(stage for stage, _ in reasons)
    raise NotBuilt(next(reason for stage, reason in reasons if stage == far))


def _running(
    model: nn.Module, cls: type, way: Way, reasons: list[tuple[int, str]], deadline: float
) -> Found | None:
    """The model on the first inputs that it runs on, if there are some."""
    said: list[str] = []
    before = len(reasons)
    for first in candidates(model, said):
        left, seen = deque([first]), set()
        while left and len(seen) < REPAIRS and time.monotonic() < deadline:
            reads = left.popleft()
            form = tuple((name, tuple(value.shape), int(value.sum())) for name, value in reads.values.items())
            if form in seen:
                continue
            seen.add(form)
            try:
                index, output = run(model, reads)
            except Exception as error:
                text = _said(cls, way, error)
                reasons.append((1, f"{', '.join(reads.values)}: {text}"))
                said.append(f"{text} {_line(error)}")
                left.extend(repaired(model, reads, text))
                continue
            if output is None:
                reasons.append((2, f"{cls.__name__}: no output depends on what it reads"))
            elif not output.isfinite().all():
                reasons.append((2, f"{cls.__name__}: its output is not finite"))
            else:
                settle(model, partial(run, model, reads))
                return Found(model, reads, way, index, tuple(output.shape))
        if time.monotonic() > deadline:
            break
    if len(reasons) == before:
        required = [
            name
            for name, parameter in inspect.signature(model.forward).parameters.items()
            if parameter.default is parameter.empty
            and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        ]
        reasons.append((1, f"{cls.__name__}: nothing is known of its inputs ({', '.join(required)})"))
    return None


def _line(error: Exception) -> str:
    """The line of the library's that stumbled over it, which names what it had not been given."""
    frames = traceback.extract_tb(error.__traceback__)
    return next((f.line or "" for f in reversed(frames) if "transformers" in f.filename), "")


def _said(cls: type, way: Any, error: Exception) -> str:
    text = str(error).strip().splitlines() or [""]
    return f"{cls.__name__} ({way.name}): {type(error).__name__}: {' '.join(text)[:300]}"


def run(model: nn.Module, reads: Reads) -> tuple[int, Tensor | None]:
    """The output that is explained, with what gets relevance on the tape."""
    values = {k: v.clone().requires_grad_(v.is_floating_point()).clone() for k, v in reads.values.items()}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    paths = dict(model.named_modules())
    handles = [
        paths[path].register_forward_hook(lambda m, a, z: z.detach().requires_grad_().clone())
        for path in reads.sources
    ]
    try:
        outputs = model(**values, **reads.fixed)
    finally:
        for handle in handles:
            handle.remove()
    index = first_output(outputs)
    return (0, None) if index is None else (index, leaves(outputs)[index])
