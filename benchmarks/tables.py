"""Tables of a report, as text for a terminal and as Markdown for the documentation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.contenders import FLOOR, FLOOR_COMPILED, ONE_EXPLANATION, OURS, OURS_COMPILED
from benchmarks.peers import PEERS
from benchmarks.work import utilisation

__all__ = ["Table", "markdown", "report_tables", "text", "undisturbed"]

DASH = "–"
# Below this mean cosine a peer has computed something else.
ALIKE = 0.99
# Below this share of its threads, what a machine gains from them says that others had its cores.
UNDISTURBED = 0.75
Row = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """A title, what it is about, and cells of text."""

    title: str
    about: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def text(table: Table) -> str:
    """For a terminal: the first column to the left, the others to the right."""
    lines = [table.columns, *table.rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]

    def aligned(line: Sequence[str]) -> str:
        cells = zip(line, widths, strict=True)
        return "  ".join(
            cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(cells)
        )

    return "\n".join((f"\n{table.title}", table.about, "", *map(aligned, lines)))


def markdown(table: Table, level: int = 3) -> str:
    """For the documentation."""
    lines = [table.columns, ["---", *["---:"] * (len(table.columns) - 1)], *table.rows]
    rows = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{'#' * level} {table.title}\n\n{table.about}\n\n{rows}\n"


def report_tables(report: Row) -> list[Table]:
    """All tables that a report has figures for."""
    measured = [row for row in report.get("table", []) if "contenders" in row]
    made = []
    if measured:
        made += [
            costs(measured, report["machine"]["threads"]),
            against_peers(measured),
            first_calls(measured),
        ]
        made += [several_outputs(measured), work_done(measured, report["machine"]["rates"])]
    if report.get("memory"):
        made.append(memory(report["memory"]))
    made += scaling(report.get("scaling", []))
    if report.get("context"):
        made.append(contexts(report["context"]))
    if report.get("loop"):
        made.append(loop(report["loop"]))
    return [table for table in made if table.rows]


def costs(rows: Iterable[Row], threads: int) -> Table:
    """This library against the floor."""
    return Table(
        "What an explanation costs",
        "Ratios to gradient × input, compiled to compiled: the median (and the quartiles) over rounds. "
        "‡: with a warning, which the report has, such as that a graph was not possible. "
        "§: other programs had the cores meanwhile, so do not trust this line.",
        ("case", "preset", "floor [ms]", "eager", "aim", "floor compiled [ms]", "compiled", "aim"),
        [
            (
                row["case"] + ("" if undisturbed(row, threads) else " §"),
                row["preset"],
                _number(row, FLOOR, "wall_ms"),
                _spread(row, OURS, FLOOR),
                _aim(row, "eager"),
                _number(row, FLOOR_COMPILED, "wall_ms"),
                _spread(row, OURS_COMPILED, FLOOR_COMPILED),
                _aim(row, "compiled"),
            )
            for row in rows
        ],
    )


def undisturbed(row: Row, threads: int) -> bool:
    """Whether torch's threads had cores of their own while a case was timed on them; not where nobody looked."""
    return (
        threads == 1
        or row.get("device", "cpu") != "cpu"
        or row.get("parallel_speedup", 0.0) >= UNDISTURBED * threads
    )


def against_peers(rows: Iterable[Row]) -> Table:
    """Other libraries, each against this one."""
    return Table(
        "Other libraries",
        "How many times as long each takes as tdhook, eager / compiled; models frozen and contexts entered beforehand. "
        f"† marks those whose result is another one (mean cosine below {ALIKE}). {DASH}: it cannot do this case.",
        ("case", "preset", *PEERS),
        [
            (row["case"], row["preset"], *(_times_as_long(row, peer) for peer in PEERS))
            for row in rows
            if any("ratio" in row["contenders"].get(peer, {}) for peer in PEERS)
        ],
    )


def several_outputs(rows: Iterable[Row]) -> Table:
    """Each output explained, against one of them."""
    return Table(
        "Several outputs at once",
        "The ratio of explaining each output to explaining one, and to the floor (one gradient).",
        ("case", "to one explanation", "aim", "to the floor"),
        [
            (row["case"], _spread(row, OURS, ONE_EXPLANATION), _aim(row, "one"), _spread(row, OURS, FLOOR))
            for row in rows
            if ONE_EXPLANATION in row["contenders"]
        ],
    )


def first_calls(rows: Iterable[Row]) -> Table:
    """Compilation, mostly."""
    names = (FLOOR, OURS, FLOOR_COMPILED, OURS_COMPILED)
    return Table(
        "The first call",
        "Seconds to prepare a model and call it for the first time, with nothing compiled before.",
        ("case", "preset", *names),
        [(row["case"], row["preset"], *(_number(row, n, "first_call_s") for n in names)) for row in rows],
    )


def work_done(rows: Iterable[Row], rates: dict[str, float]) -> Table:
    """Products and bytes of eager calls, against the machine's own rates."""
    return Table(
        "Where the time goes",
        "Products done and bytes read and written by the operations of a call, and the shares of the machine's own "
        f"rates that this makes: {rates['matmul_gflop_per_s']:.0f} GFLOP/s for a large product and "
        f"{rates['copy_gigabytes_per_s']:.1f} GB/s for a large copy. What fits in a cache moves faster than that.",
        (
            "case",
            "preset",
            *(f"{n}: {u}" for n in (FLOOR, OURS) for u in ("GFLOP", "GB", "products", "copy")),
        ),
        [
            (row["case"], row["preset"], *(cell for n in (FLOOR, OURS) for cell in _work(row, n, rates)))
            for row in rows
        ],
    )


def memory(rows: Iterable[Row]) -> Table:
    """Peaks, without and with parameters."""

    def cells(row: Row) -> tuple[str, ...]:
        if "missing" in row:
            return 5 * (DASH,)
        base, ours = row["contenders"][FLOOR], row["contenders"][OURS]
        megabytes = (f"{n / 1e6:.3g}" for n in (base["peak"], ours["peak"], ours["held"]))
        return *megabytes, f"{row['ratio']:.2f}", f"{row['ratio_with_parameters']:.2f}"

    return Table(
        "Peak memory",
        "Of one call in MB, beyond the model and its inputs; what is held between calls (cached weights) is part of "
        "it. The last column counts the model's parameters on both sides.",
        ("case", "preset", FLOOR, OURS, "of it held", "ratio", "with parameters"),
        [(row["case"], row["preset"], *cells(row)) for row in rows],
    )


def scaling(rows: Sequence[Row]) -> list[Table]:
    """One table per curve."""
    curves: dict[str, list[Row]] = {}
    for row in rows:
        curves.setdefault(row["curve"], []).append(row)
    return [
        Table(
            f"Scaling: {curve}",
            "Ratios to the floor, eager.",
            (curve.split(",")[0], *(str(row["value"]) for row in points)),
            [
                ("to the floor", *(f"{row['ratio'][1]:.2f}" for row in points)),
                *(
                    [("to one explanation", *(f"{row['ratio_to_one'][1]:.2f}" for row in points))]
                    if "ratio_to_one" in points[0]
                    else []
                ),
                ("ms", *(f"{row['wall_ms']:.3g}" for row in points)),
            ],
        )
        for curve, points in curves.items()
    ]


def contexts(rows: Iterable[Row]) -> Table:
    """Entering, and the first call, against later ones."""
    names = ("enter_ms", "first_ms", "later_ms", "with_ms", "floor_ms")
    return Table(
        "Entering a context",
        "Milliseconds, eager: to wrap a model, for the first call and for later ones, for entering and one call in a "
        "`with` block, and for the floor; and what a later call costs beyond the floor, per module of the model.",
        ("model", "modules", "enter", "first call", "later calls", "`with`", "floor", "µs per module"),
        [
            (row["case"], *7 * (DASH,))
            if "missing" in row
            else (
                row["case"],
                str(row["modules"]),
                *(f"{row[n]:.3g}" for n in names),
                f"{row['us_per_module']:.1f}",
            )
            for row in rows
        ],
    )


def loop(rows: Iterable[Row]) -> Table:
    """A loop with attribution against the same without."""

    def cells(row: Row) -> list[str]:
        entry, sign = ("frames_per_s", "≥") if row["rate"] else ("wall_ms", "≤")
        found = [row["case"], "frames/s" if row["rate"] else "ms", _number(row, "without", entry)]
        for name in (OURS, OURS_COMPILED):
            contender = row.get("contenders", {}).get(name)
            if contender is None:
                found += 3 * [DASH]
                continue
            low, median, high = contender["ratio"]
            cpu = contender["cpu_ratio"]
            found += [f"{contender[entry]:.3g}", f"{median:.2f} ({low:.2f}–{high:.2f})", f"{cpu:.2f}"]
        return [*found, f"{sign} {row['aim']:g}"]

    kinds = ("eager", "ratio", "of processor time", "compiled", "ratio", "of processor time")
    return Table(
        "In the training loop",
        "CartPole-v1 in 32 environments, a policy of two hidden layers of 64: frames per second of a collector whose "
        "policy explains every step, and the time of an update by PPO (1024 frames, 4 epochs in minibatches of 128) in "
        "which the batch is explained once, or every minibatch of every epoch; against the same without. Medians over "
        "rounds that take turns, quartiles in brackets.",
        ("what", "unit", "without", *kinds, "aim of the ratio"),
        [cells(row) for row in rows],
    )


def _number(row: Row, name: str, entry: str) -> str:
    value = row.get("contenders", {}).get(name, {}).get(entry)
    return DASH if value is None else f"{value:.3g}"


def _spread(row: Row, name: str, base: str) -> str:
    entry = row["contenders"].get(name, {})
    ratio = entry.get("ratio", {}).get(base)
    mark = " ‡" if entry.get("notes") else ""
    return DASH if ratio is None else f"{ratio[1]:.2f} ({ratio[0]:.2f}–{ratio[2]:.2f}){mark}"


def _aim(row: Row, name: str) -> str:
    return f"≤ {row['aim'][name]:g}" if name in row["aim"] else ""


def _times_as_long(row: Row, peer: str) -> str:
    entry = row["contenders"].get(peer, {})
    if "ratio" not in entry:
        return DASH
    ratios = (entry["ratio"].get(base) for base in (OURS, OURS_COMPILED))
    mark = " †" if entry.get("cosine", 0.0) < ALIKE else ""
    return " / ".join(DASH if ratio is None else f"{ratio[1]:.2g}" for ratio in ratios) + mark


def _work(row: Row, name: str, rates: dict[str, float]) -> tuple[str, ...]:
    entry = row["contenders"].get(name, {})
    if "gflop" not in entry:
        return 4 * (DASH,)
    moved, products = utilisation(entry, rates)
    return f"{entry['gflop']:.3g}", f"{entry['gigabytes']:.3g}", f"{products:.0%}", f"{moved:.0%}"
