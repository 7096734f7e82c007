"""How the ratio to the floor goes with batch, width, depth, sequence length and the number of targets."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any

from benchmarks.cases import Case
from benchmarks.contenders import FLOOR, ONE_EXPLANATION, OURS
from benchmarks.measuring import Settings, measure
from benchmarks.models import gpt2, mlp, nature_cnn

__all__ = ["CURVES", "measure_scaling"]

PIXELS = (4, 84, 84)


def small_gpt2() -> Any:
    return gpt2(width=256, depth=2, vocabulary=1000)


# By what varies: the values, and the case for each.
CURVES: dict[str, dict[int, Case]] = {
    "batch, MLP 17-256-256-6": {
        n: Case("MLP", "epsilon_plus", mlp, (17,), n) for n in (1, 4, 16, 64, 256, 1024, 4096)
    },
    "batch, Nature CNN": {
        n: Case("Nature CNN", "epsilon_plus", nature_cnn, PIXELS, n) for n in (1, 4, 16, 64)
    },
    "width, MLP of 2 hidden layers, batch 64": {
        n: Case(f"width {n}", "epsilon_plus", partial(mlp, width=n), (17,), 64)
        for n in (16, 64, 256, 1024, 2048)
    },
    "depth, MLP 64 wide, batch 64": {
        n: Case(f"depth {n}", "epsilon_plus", partial(mlp, width=64, depth=n), (17,), 64)
        for n in (1, 4, 16, 64)
    },
    "sequence length, GPT-2 shaped, 2x256": {
        n: Case(f"T={n}", "attn_lrp", small_gpt2, (n, 256), 1) for n in (16, 64, 256, 1024)
    },
    "number of targets, Nature CNN, batch 8": {
        n: Case(f"{n} actions", "epsilon_plus", partial(nature_cnn, actions=n), PIXELS, 8, index="all")
        for n in (1, 2, 4, 9, 18)
    },
}


def measure_scaling(settings: Settings, wanted: str = "") -> Iterator[dict[str, Any]]:
    """One row per point: quartiles of the ratio to the floor, eager, without peers."""
    settings = dataclasses.replace(settings, compiled=False, peers=False)
    for curve, cases in CURVES.items():
        if wanted not in curve:
            continue
        for value, case in cases.items():
            ours = measure(case, settings)["contenders"][OURS]
            row = {"curve": curve, "value": value, "wall_ms": ours["wall_ms"], "ratio": ours["ratio"][FLOOR]}
            if ONE_EXPLANATION in ours["ratio"]:
                row["ratio_to_one"] = ours["ratio"][ONE_EXPLANATION]
            yield row
