"""Measure what explanations cost, against gradient times input in the same process, and print tables."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the memory profiler is silent

import torch

from benchmarks import import_time
from benchmarks.cases import CASES, Case
from benchmarks.contenders import ONE_EXPLANATION, OURS, OURS_COMPILED, is_gpu
from benchmarks.context import CONTEXT_CASES, measure_context
from benchmarks.loop import LOOP_CASES, LoopCase, measure_loop
from benchmarks.machine import machine
from benchmarks.measuring import Settings, measure
from benchmarks.memory import measure_memory
from benchmarks.plots import plot
from benchmarks.scaling import measure_scaling
from benchmarks.tables import report_tables, text, undisturbed

SECTIONS = ("table", "memory", "scaling", "context", "loop", "imports", "gpu")
Report = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is asked for and print, save and draw it."""
    arguments = parser().parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    settings = Settings(arguments.seconds, "cpu", not arguments.no_compile, not arguments.no_peers)
    sections = arguments.only or SECTIONS
    cases = [case for case in CASES if all(word in label(case) for word in arguments.words)]
    reports: list[Report] = []
    for device in devices(sections):
        report: Report = {"machine": machine(device)}
        reports.append(report)
        for section, rows in measurements(sections, cases, settings.on(device), arguments.words):
            report[section] = []
            for row in rows:
                report[section].append(row)
                if arguments.json:  # after each row, so that what was measured outlasts an interruption
                    arguments.json.write_text(json.dumps(rounded(reports), indent=1) + "\n")
        show(report)
    if "imports" in sections and not arguments.words:
        import_time.main([])
    if arguments.plot and reports:
        plot(reports[0], arguments.plot)


def devices(sections: Collection[str]) -> list[str]:
    """Where there is something to measure."""
    found = ["cpu"] if {"table", "memory", "scaling", "context", "loop"} & set(sections) else []
    return [*found, "cuda"] if "gpu" in sections and torch.cuda.is_available() else found


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    made.add_argument("words", nargs="*", help="only cases in whose name or preset all of these occur")
    made.add_argument(
        "--only",
        action="append",
        choices=SECTIONS,
        help="leave out other sections; can be given several times",
    )
    made.add_argument("--seconds", type=float, default=5.0, help="time to spend on each case, at least")
    made.add_argument("--threads", type=int, help="of torch; by default as many as it takes")
    made.add_argument("--no-compile", action="store_true", help="leave out what compiles first")
    made.add_argument("--no-peers", action="store_true", help="leave out other libraries")
    made.add_argument("--json", type=Path, help="write the report to this file")
    made.add_argument("--plot", type=Path, help="draw the report into this file")
    return made


def label(case: Case | LoopCase) -> str:
    return f"{case.name} {case.preset}"


def measurements(
    sections: Collection[str], cases: Sequence[Case], settings: Settings, words: Sequence[str]
) -> Iterable[tuple[str, Iterable[Report]]]:
    """The sections of a report that are asked for, measured as they are read."""
    if is_gpu(settings.device):  # the same table, at batch sizes that keep a GPU busy
        sections, cases = ("table", "memory"), [case.on_gpu() for case in cases if case.gpu_batch]
    if "table" in sections:
        yield "table", told(lambda case: measure(case, settings), cases)
    if "memory" in sections:
        yield "memory", told(lambda case: measure_memory(case, settings.device), cases)
    if "scaling" in sections:
        yield "scaling", measure_scaling(settings, " ".join(words))
    if "context" in sections:
        wanted = (case for case in CONTEXT_CASES if all(word in label(case) for word in words))
        yield "context", told(measure_context, wanted)
    if "loop" in sections:
        looping = (case for case in LOOP_CASES if all(word in label(case) for word in words))
        yield "loop", told(lambda case: measure_loop(case, settings), looping)


def told(measured: Callable[[Any], Report], cases: Iterable[Any]) -> Iterable[Report]:
    """Each case measured, and said on the way, with what was left out or warned of."""
    for case in cases:
        start = time.perf_counter()
        row = measured(case)
        print(f"{label(case)}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        if "parallel_speedup" in row and not undisturbed(row, torch.get_num_threads()):
            print("  others have the cores: not to be trusted", file=sys.stderr, flush=True)
        entries = row.get("contenders", {})
        own = {name: entries[name] for name in (OURS, OURS_COMPILED, ONE_EXPLANATION) if name in entries}
        for name, entry in {case.model_name: row, **own}.items():
            for reason in filter(None, (*entry.get("notes", ()), entry.get("missing"))):
                print(f"  {name}: {reason}", file=sys.stderr, flush=True)
        yield row


def show(report: Report) -> None:
    """Print the tables of a report, below what it was made on."""
    print("\n" + ", ".join(f"{name} {value}" for name, value in report["machine"].items()))
    for table in report_tables(report):
        print(text(table))


def rounded(value: Any) -> Any:
    """Four digits are more than a measurement has."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    return [rounded(each) for each in value] if isinstance(value, list | tuple) else value


if __name__ == "__main__":
    main()
