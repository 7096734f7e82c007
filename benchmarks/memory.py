"""Peak memory, by the allocator's own account, so that what lies inside an operation or a compiled graph counts too."""

from __future__ import annotations

import gc
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from tensordict import TensorDict
from torch.profiler import ProfilerActivity, profile

from benchmarks.cases import Case
from benchmarks.contenders import FLOOR, OURS, floor, lrp
from benchmarks.library_models import Unavailable
from benchmarks.timing import Contender

__all__ = ["measure_memory"]


def measure_memory(case: Case, device: str = "cpu") -> dict[str, Any]:
    """Bytes that the floor and this library need, without and with the parameters of the model.

    ``held`` is what stays allocated between calls, such as cached weights; it is part of ``peak``. The floor's model is
    frozen, without which it would save what only gradients of the parameters need.
    """
    row: dict[str, Any] = {"case": case.name, "preset": case.preset, "device": device}
    try:
        frozen, trainable = case.model(device, frozen=True), case.model(device)
    except Unavailable as reason:
        return row | {"missing": str(reason)}
    td = case.data(device)
    base = _needs(lambda: Contender(floor(frozen)), td)
    ours = _needs(lambda: lrp(case, trainable), td)
    parameters = sum(p.nbytes for p in frozen.parameters())
    return row | {
        "parameters": parameters,
        "contenders": {FLOOR: base, OURS: ours},
        "ratio": ours["peak"] / base["peak"],
        "ratio_with_parameters": (ours["peak"] + parameters) / (base["peak"] + parameters),
    }


def _needs(make: Callable[[], Contender], td: TensorDict) -> dict[str, int]:
    growth = _gpu_growth if td["observation"].is_cuda else _cpu_growth
    made: list[Contender] = []

    def prepare() -> None:
        made.append(make())
        for _ in range(2):
            made[0].relevance(td)
        gc.collect()

    _, held = growth(prepare)
    peak, _ = growth(lambda: made[0].explain(td.detach()))
    return {"held": held, "peak": held + peak}


def _cpu_growth(function: Callable[[], object]) -> tuple[int, int]:
    """By how many bytes memory grew at most, and in the end."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = list(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))
    return max(sizes, default=0), sizes[-1] if sizes else 0


def _gpu_growth(function: Callable[[], object]) -> tuple[int, int]:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before
