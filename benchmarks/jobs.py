"""What a job costs beside explaining: ``python -m benchmarks.jobs``.

Explaining chunk by chunk is compared with the same calls in a loop, in one process, in turns. Reading, writing and
committing are timed within the job. Rows per CPU second of two workers are compared with those of one, in turns, and so
are those of two processes that share the rows in loops without a job, which is what the machine lets two have. Memory
is the largest resident set of a process that works on a job.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule

from benchmarks.models import mlp, nature_cnn
from tdhook import LRP, Target
from tdhook.datasets import Job, Place

ROWS = {"MLP": 1 << 17, "CNN": 1024}
SHARED = {"MLP": 1 << 20, "CNN": 4096}
"""Rows that two workers share, in 16 chunks."""
LARGE = {"MLP": 10_000_000, "CNN": 50_000}


def model_of(case: str) -> TensorDictModule:
    """The policy of a case."""
    torch.manual_seed(0)
    return TensorDictModule((mlp if case == "MLP" else nature_cnn)(), ["observation"], ["action_value"])


def method() -> LRP:
    """How it is explained."""
    return LRP("epsilon_plus", target=Target("action_value", "argmax"))


def as_numbers(rows: TensorDictBase) -> TensorDictBase:
    """Frames of bytes as the policy reads them."""
    return rows.copy().set("observation", rows["observation"] / 255)


def make_source(case: str, rows: int, home: Path) -> Path:
    """Observations on disk: vectors, or stacked frames of which most is one colour."""
    if case == "MLP":
        td = TensorDict({"observation": torch.zeros(1, 17).expand(rows, 17)}, [rows]).memmap_like(home)
        for part in td.split(1 << 18):
            part["observation"].normal_()
    else:
        shape = (4, 84, 84)
        empty = torch.zeros(1, *shape, dtype=torch.uint8).expand(rows, *shape)
        td = TensorDict({"observation": empty}, [rows]).memmap_like(home)
        for part in td.split(1 << 10):
            part["observation"].random_(256)
    return home


def job(case: str, source: Path, out: Path, **options: Any) -> Job:
    """The job of a case."""
    prepare = as_numbers if case == "CNN" else None
    return Job(method(), model_of(case), source, out, prepare=prepare, **options)


@contextmanager
def timed(spent: dict[str, float], owner: object, name: str, what: str) -> Iterator[None]:
    """Add up how long calls of a method take."""
    original = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        begun = time.perf_counter()
        try:
            return original(*args, **kwargs)
        finally:
            spent[what] += time.perf_counter() - begun

    setattr(owner, name, call)
    try:
        yield
    finally:
        delattr(owner, name)


def measure_parts(case: str, home: Path, rounds: int) -> dict[str, Any]:
    """A job against a loop, and where its time goes."""
    source = make_source(case, ROWS[case], home / "source")
    whole: dict[str, list[float]] = defaultdict(list)
    for number in range(rounds):
        out = home / f"out-{number}"
        made = job(case, source, out)
        folder, spent = made.folder, defaultdict[str, float](float)
        explaining = made.chunks.explaining
        with (
            timed(spent, explaining, "_read", "read"),
            timed(spent, explaining.recorded, "entries", "explain"),
            timed(spent, folder, "write_rows", "write"),
            timed(spent, folder, "sync_rows", "commit"),
            timed(spent, folder, "commit", "commit"),
        ):
            begun = time.perf_counter()
            made.work()
            spent["job"] = time.perf_counter() - begun
        spent["loop"] = loop(case, source, made.chunks.explaining.recorded.at_once or 1)
        for name, seconds in spent.items():
            whole[name].append(seconds)
        shutil.rmtree(out)
    median = {name: statistics.median(times) for name, times in whole.items()}
    each = [job_time / loop_time for job_time, loop_time in zip(whole["explain"], whole["loop"], strict=True)]
    beside = [
        (a + b + c) / total
        for a, b, c, total in zip(whole["read"], whole["write"], whole["commit"], whole["job"], strict=True)
    ]
    return {
        "case": case,
        "rows": ROWS[case],
        "rows_per_second": ROWS[case] / median["job"],
        "explain_to_loop": statistics.median(each),
        "share_beside": statistics.median(beside),
        "seconds": median,
    }


def loop(case: str, source: Path, at_once: int, number: int = 0, of: int = 1) -> float:
    """How long the same explanations take in a loop, of rows that are in memory: one of so many shares of them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # and no other threads are met where this is a fork
    rows = TensorDict.load_memmap(source)
    rows = rows.split(-(-len(rows) // of))[number].clone()
    rows = rows if case == "MLP" else as_numbers(rows)
    explained = method().wrap(model_of(case).eval())
    begun = time.perf_counter()
    for part in rows.split(at_once):
        explained(part)
    seconds = time.perf_counter() - begun
    torch.set_num_threads(before)
    return seconds


def measure_workers(case: str, home: Path, rounds: int) -> dict[str, Any]:
    """Rows per CPU second of two workers against those of one, and of two loops without a job likewise."""
    rows = SHARED[case]
    source = make_source(case, rows, home / "source")
    rates: dict[tuple[str, int], list[float]] = defaultdict(list)
    for number in range(rounds):
        for workers in (1, 2):
            out = home / f"out-{number}-{workers}"
            made = job(case, source, out, chunk=rows // 16)
            at_once = made.chunks.explaining.recorded.at_once or 1
            ways = {"job": partial(work_on, made), "loop": partial(loop, case, source, at_once)}
            for name, way in ways.items():
                rates[name, workers].append(rows / cpu_seconds(way, workers))
            shutil.rmtree(out)
    each = {
        name: [two / one for one, two in zip(rates[name, 1], rates[name, 2], strict=True)]
        for name in ("job", "loop")
    }
    return {
        "case": case,
        "rows": rows,
        "rows_per_cpu_second": {workers: statistics.median(rates["job", workers]) for workers in (1, 2)},
        "two_workers_to_one": statistics.median(each["job"]),
        "two_loops_to_one": statistics.median(each["loop"]),
    }


def work_on(made: Job, number: int, of: int) -> None:
    """Be one of the workers of a job."""
    made.work(place=Place(number, of))


def cpu_seconds(way: Callable[[int, int], object], workers: int) -> float:
    """Seconds of all cores that so many processes take, each for its share, once they are there."""
    read, write = os.pipe()
    for number in range(workers):
        if not os.fork():
            before = time.process_time()
            way(number, workers)
            os.write(write, f"{time.process_time() - before}\n".encode())
            os._exit(0)
    for _ in range(workers):
        os.wait()
    os.close(write)
    with open(read) as told:
        return sum(map(float, told))


WORK = """
import sys
from pathlib import Path
from benchmarks.jobs import job
from tdhook.datasets import Moments
case, source, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
keep = None if case == "CNN" else "all"
job(case, source, out, keep=keep, reduce=[Moments()]).work(until=UNTIL)
told = Path("/proc/self/status").read_text()
print(next(line.split()[1] for line in told.splitlines() if line.startswith("VmHWM")))
"""


def measure_memory(case: str, home: Path, most: float) -> dict[str, Any]:
    """The largest resident set of a worker, in MiB, in a job that goes on for so many seconds at most."""
    source = make_source(case, LARGE[case], home / "large")
    until = f"lambda begun=__import__('time').time(): __import__('time').time() - begun > {most}"
    done = subprocess.run(
        [sys.executable, "-c", WORK.replace("UNTIL", until), case, str(source), str(home / "memory")],
        capture_output=True,
        text=True,
        check=True,
    )
    imported = subprocess.run(
        [
            sys.executable,
            "-c",
            "import benchmarks.jobs\n"
            + "".join(WORK.partition("told =")[1:]).replace("Path", "__import__('pathlib').Path"),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    return {
        "case": case,
        "rows": LARGE[case],
        "mebibytes": int(done.stdout.split()[-1]) / 1024,
        "of_imports": int(imported.stdout.split()[-1]) / 1024,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.jobs", description=__doc__)
    made.add_argument("--rounds", type=int, default=5)
    made.add_argument("--memory-seconds", type=float, default=60.0)
    made.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = made.parse_args(argv)
    found: list[dict[str, Any]] = []
    for case in ROWS:
        measured = (
            partial(measure_parts, rounds=arguments.rounds),
            partial(measure_workers, rounds=arguments.rounds),
            partial(measure_memory, most=arguments.memory_seconds),
        )
        for measure in measured:
            with tempfile.TemporaryDirectory() as home:
                found.append(measure(case, Path(home)))
            print(json.dumps(found[-1], indent=1), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
