"""A report as a picture: costs by case, and how they scale; ``python -m benchmarks.plots REPORT.json FILE.png``."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from benchmarks.contenders import FLOOR, FLOOR_COMPILED, OURS, OURS_COMPILED
from benchmarks.peers import PEERS

__all__ = ["plot"]

BARS = ((OURS, FLOOR), (OURS_COMPILED, FLOOR_COMPILED), *((peer, FLOOR) for peer in PEERS))


def plot(report: dict[str, Any], file: Path) -> None:
    """Draw the ratios to the floor as bars, with quartiles as lines, and the scaling curves below them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    curves: dict[str, list[dict[str, Any]]] = {}
    for row in report.get("scaling", []):
        curves.setdefault(row["curve"], []).append(row)
    rows = [row for row in report.get("table", []) if "contenders" in row]
    lines = math.ceil(len(curves) / 3)
    tall = 0.7 * len(rows) + 1
    figure = pyplot.figure(figsize=(12, tall + 3 * lines), layout="constrained")
    grid = figure.add_gridspec(1 + lines, 3, height_ratios=[max(tall, 0.1), *lines * [3]])
    if rows:
        draw_costs(figure.add_subplot(grid[0, :]), rows)
    for i, (curve, points) in enumerate(curves.items()):
        draw_curve(figure.add_subplot(grid[1 + i // 3, i % 3]), curve, points)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def draw_costs(axes: Any, rows: list[dict[str, Any]]) -> None:
    """One group of bars per case, the first on top."""
    bars = {
        bar: [(y, ratio) for y, row in enumerate(rows) if (ratio := _ratio(row, *bar)) is not None]
        for bar in BARS
    }
    bars = {bar: found for bar, found in bars.items() if found}
    height = 0.8 / len(bars)
    for i, ((name, base), found) in enumerate(bars.items()):
        low, middle, high = zip(*(ratio for _, ratio in found), strict=True)
        spread = [
            [m - x for x, m in zip(low, middle, strict=True)],
            [x - m for x, m in zip(high, middle, strict=True)],
        ]
        where = [y + (i + 0.5) * height for y, _ in found]
        axes.barh(where, middle, height, xerr=spread, label=f"{name} / {base}")
    axes.set_yticks([y + 0.4 for y in range(len(rows))], [f"{row['case']}\n{row['preset']}" for row in rows])
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xlabel("time, as a ratio to gradient × input")
    axes.legend()


def _ratio(row: dict[str, Any], name: str, base: str) -> list[float] | None:
    found: list[float] | None = row["contenders"].get(name, {}).get("ratio", {}).get(base)
    return found


def draw_curve(axes: Any, curve: str, points: list[dict[str, Any]]) -> None:
    """The ratio to the floor, with its quartiles as a band."""
    values = [row["value"] for row in points]
    low, middle, high = zip(*(row["ratio"] for row in points), strict=True)
    axes.fill_between(values, low, high, alpha=0.3)
    axes.plot(values, middle, marker="o", label="to the floor")
    if "ratio_to_one" in points[0]:
        axes.plot(values, [row["ratio_to_one"][1] for row in points], marker="o", label="to one explanation")
        axes.legend()
    what, _, where = curve.partition(", ")
    axes.set_title(where, fontsize="small")
    axes.set_xscale("log")
    axes.set_xticks(values, map(str, values), fontsize="small")
    axes.minorticks_off()
    axes.set_xlabel(what)
    axes.set_ylim(bottom=0)
    axes.axhline(1, color="black", linewidth=1)


def main() -> None:
    """Draw the first part of a report that was written before."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("report", type=Path)
    parser.add_argument("file", type=Path)
    arguments = parser.parse_args()
    plot(json.loads(arguments.report.read_text())[0], arguments.file)


if __name__ == "__main__":
    main()
