"""What it costs to enter a context and to call for the first time, and what a call costs per module of the model."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from benchmarks.cases import Case
from benchmarks.contenders import floor
from benchmarks.library_models import Unavailable, resnet50
from benchmarks.models import gpt2
from tdhook import LRP, Target

__all__ = ["CONTEXT_CASES", "measure_context"]


def tiny_layers(count: int) -> nn.Module:
    """So small that what is left is the cost of calling them."""
    return nn.Sequential(*(layer for _ in range(count // 2) for layer in (nn.Linear(4, 4), nn.ReLU())))


CONTEXT_CASES = (
    *(Case(f"{n} tiny layers", "epsilon_plus", partial(tiny_layers, n), (4,), 1) for n in (10, 40, 160, 640)),
    Case("GPT-2 shaped, 24x64, T=8", "attn_lrp", partial(gpt2, 64, 24, 100), (8, 64), 1),
    Case("ResNet-50, 32x32 pixels", "epsilon_plus", resnet50, (3, 32, 32), 1),
)


def measure_context(case: Case, rounds: int = 9) -> dict[str, Any]:
    """Medians in milliseconds: of entering, of the first call and of later ones, and of the floor."""
    try:
        model = case.model()
    except Unavailable as reason:
        return {"case": case.name, "missing": str(reason)}
    td = case.data()
    lrp = LRP(case.preset, target=Target("action_value", "argmax"))
    base = floor(model)
    times: dict[str, list[float]] = {name: [] for name in ("enter", "first", "later", "with", "floor")}
    for _ in range(rounds):
        explained = timed(lambda: lrp.wrap(model), times["enter"])
        timed(partial(explained, td.detach()), times["first"])
        for _ in range(3):
            timed(partial(explained, td.detach()), times["later"])
            timed(partial(base, td.detach()), times["floor"])
        timed(partial(enter_and_call, lrp, model, td.detach()), times["with"])
    modules = sum(1 for _ in model.modules())
    found = {f"{name}_ms": 1e3 * statistics.median(seconds) for name, seconds in times.items()}
    constant = 1e3 * (found["later_ms"] - found["floor_ms"]) / modules
    return {"case": case.name, "modules": modules, **found, "us_per_module": constant}


def enter_and_call(lrp: LRP, model: nn.Module, td: Any) -> None:
    with lrp.prepare(model) as explained:
        explained(td)


def timed(function: Callable[[], Any], seconds: list[float]) -> Any:
    start = time.perf_counter()
    result = function()
    seconds.append(time.perf_counter() - start)
    return result
