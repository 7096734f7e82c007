"""Print a table of costs: medians over interleaved runs, as ratios to the floor in the same process."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import import_time
from benchmarks.cases import CASES, Case, explained, floor


def measure(case: Case, seconds: float) -> dict[str, Any]:
    model = case.model()
    contenders = {"floor": floor(model), "lrp": explained(case, model)}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    td = case.data()
    for function in contenders.values():
        for _ in range(3):
            function(td.copy())
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["lrp"]) < 5:
        for name, function in contenders.items():
            fresh = td.copy()
            start = time.perf_counter()
            function(fresh)
            times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(t) for name, t in times.items()}
    return {
        "case": case.name,
        "preset": case.preset,
        "floor_ms": 1e3 * medians["floor"],
        "lrp_ms": 1e3 * medians["lrp"],
        "ratio": medians["lrp"] / medians["floor"],
        "runs": len(times["lrp"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("only", nargs="?", default="", help="time the cases alone whose name contains this")
    parser.add_argument("--seconds", type=float, default=3.0, help="time to spend on each case")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    rows = []
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}")
    print(f"{'case':30}{'preset':24}{'floor [ms]':>12}{'LRP [ms]':>12}{'ratio':>8}{'runs':>7}")
    for case in (case for case in CASES if arguments.only in case.name):
        row = measure(case, arguments.seconds)
        rows.append(row)
        print(
            f"{row['case']:30}{row['preset']:24}{row['floor_ms']:12.3f}{row['lrp_ms']:12.3f}"
            f"{row['ratio']:8.2f}{row['runs']:7}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")
    if not arguments.only:
        import_time.main([])


if __name__ == "__main__":
    main()
