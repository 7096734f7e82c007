"""Many workers of one job, in simulated time: ``python -m benchmarks.swarm``.

What decides which worker does which chunk is the library's own: its turns and claims run as they are. Simulated are the
clock, the folder of claims and notes, with the time that each look at it takes, and workers: how fast they are, which
of them are slow, and which die. Efficiency is the time that the same workers would need if none ever waited or did
anything twice, over the time that they need.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tdhook.datasets.claims import ClaimFiles, Claims, Worker, this_worker
from tdhook.datasets.folder import JobFolder
from tdhook.datasets.turns import Turns
from tdhook.datasets.units import Place, Units

_LISTED = 800
"""Names that one operation lists: what a reply of 32 KiB holds."""
_PIECES = 8
"""How many times a worker looks, within a chunk, whether another has done it."""


@dataclass
class Case:
    """What is simulated.

    Attributes:
        name: what it is called.
        workers: how many.
        machines: on how many machines, each of whose workers know of each other whether they live.
        chunks: how many there are.
        seconds: how long a chunk takes, but for 10 % more or less.
        slow: the share of workers that are ``times`` as slow.
        times: how slow.
        deaths: the share of machines that die on the way, with all of their workers.
        placed: whether the launcher tells workers their places; else all begin at the first chunk.
        lease: seconds after which a claim is taken over.
        operation: seconds that an operation on the folder takes.
        per_second: how many of them the file system does in a second, for all.
    """

    name: str
    workers: int = 1000
    machines: int = 64
    chunks: int = 50_000
    seconds: float = 20.0
    slow: float = 0.0
    times: float = 5.0
    deaths: float = 0.0
    placed: bool = True
    lease: float = 60.0
    operation: float = 0.001
    per_second: float = 20_000.0


CASES = (
    Case("all alike"),
    Case("all begin at the first chunk", placed=False),
    Case("1 in 20 workers is 5 times as slow", slow=0.05),
    Case("1 in 20 machines dies", deaths=0.05),
    Case("1 in 20 slow, 1 in 20 machines dies", slow=0.05, deaths=0.05),
    Case("20 chunks for each worker", chunks=20_000, slow=0.05, deaths=0.05),
    Case("8 chunks for each worker", chunks=8_000),
    Case("short chunks, of 2 seconds", seconds=2.0, slow=0.05, deaths=0.05),
    Case("a slow file system", operation=0.02, per_second=2_000.0, slow=0.05, deaths=0.05),
)


@dataclass
class Folder:
    """The folder that all workers see: claims, and which chunks are done."""

    case: Case
    now: float = 0.0
    operations: float = 0.0
    busy_until: float = 0.0
    done: set[int] = field(default_factory=set)
    claims: dict[str, tuple[str, float]] = field(default_factory=dict)
    dies: dict[str, float] = field(default_factory=dict)

    def is_done(self, unit: int) -> bool:
        self.operations += 1
        return unit in self.done

    def all_done(self) -> set[int]:
        self.operations += 1 + len(self.done) / _LISTED
        return set(self.done)

    def put(self, name: str, text: str) -> bool:
        self.operations += 1
        if name in self.claims:
            return False
        self.operations += 3
        self.claims[name] = text, self.now
        return True

    def look(self, name: str) -> tuple[int, str] | None:
        self.operations += 2
        if name not in self.claims:
            return None
        text, since = self.claims[name]
        lived = min(self.now, self.dies[json.loads(text)["name"]]) - since
        return int(lived / (self.case.lease / 4)), text

    def touch(self, name: str) -> None:
        """Workers touch their claims while they live: :meth:`look` knows."""

    def remove(self, name: str, text: str) -> None:
        self.operations += 3
        if name in self.claims and self.claims[name][0] == text:
            del self.claims[name]

    def names(self) -> list[str]:
        self.operations += 1 + len(self.claims) / _LISTED
        return list(self.claims)

    def spent(self) -> float:
        """The seconds that the operations since the last call take a worker."""
        self.busy_until = max(self.busy_until, self.now) + self.operations / self.case.per_second
        seconds = max(self.operations * self.case.operation, self.busy_until - self.now)
        self.operations = 0.0
        return seconds


@dataclass(frozen=True)
class Outcome:
    """What came of it."""

    seconds: float
    ideal: float
    twice: int
    operations_per_second: float

    @property
    def efficiency(self) -> float:
        return self.ideal / self.seconds


def simulate(case: Case, seed: int = 0) -> Outcome:
    """Have the workers of a case do all chunks."""
    chance = random.Random(seed)
    folder = Folder(case)
    whole = case.chunks * case.seconds / case.workers
    dying = set(chance.sample(range(case.machines), round(case.deaths * case.machines)))
    ends = [chance.uniform(0, whole) if i in dying else math.inf for i in range(case.machines)]
    slow = set(chance.sample(range(case.workers), round(case.slow * case.workers)))
    takes = [case.seconds * (case.times if i in slow else 1.0) for i in range(case.workers)]
    dies = [ends[i % case.machines] for i in range(case.workers)]
    units = Units(case.chunks, 1)
    started, total = 0, 0.0

    def worker(number: int) -> Iterator[float]:
        """One worker: gives the seconds until it goes on."""
        nonlocal started, total
        who = Worker(str(number), str(number % case.machines), number, "")
        folder.dies[who.name] = dies[number]

        def clock() -> float:
            return folder.now

        def gone(ours: Worker, claim: str) -> bool:
            told = json.loads(claim)
            return told["machine"] == ours.machine and folder.dies[told["name"]] <= folder.now

        claims = Claims(folder, who, case.lease, clock, gone)
        place = Place(number, case.workers) if case.placed else Place()
        turns = Turns(
            [*place.order(units)], claims, folder, random.Random(seed * case.workers + number), clock
        )
        while (turn := turns.next()) is not None:
            total += folder.operations
            yield folder.spent()
            if turn.unit is None:
                yield turn.pause
                continue
            started += 1
            seconds = takes[number] * chance.uniform(0.9, 1.1)
            for _ in range(_PIECES):
                yield seconds / _PIECES
                if folder.is_done(turn.unit):
                    break
            folder.done.add(turn.unit)
            folder.operations += 4
            claims.release(turn.unit)
            turns.ended(turn.unit)
            total += folder.operations
            yield folder.spent()

    queue = [(0.0, i, worker(i)) for i in range(case.workers)]
    last = 0.0
    while queue:
        now, number, one = heapq.heappop(queue)
        if now >= dies[number]:
            continue
        folder.now = now
        pause = next(one, None)
        if pause is None:
            last = max(last, now)
        else:
            heapq.heappush(queue, (now + pause, number, one))
    assert len(folder.done) == case.chunks
    return Outcome(last, _ideal(case, takes, dies), started - case.chunks, total / last)


def _ideal(case: Case, takes: list[float], dies: list[float]) -> float:
    """The seconds that it takes if nobody ever waits: until so many chunks are done by those that live."""
    low, high = 0.0, case.chunks * max(takes)
    for _ in range(60):
        middle = (low + high) / 2
        if sum(min(middle, end) / each for each, end in zip(takes, dies, strict=True)) < case.chunks:
            low = middle
        else:
            high = middle
    return high


def measured_pieces(home: Path, count: int = 200) -> dict[str, float]:
    """Seconds that a claim, and a note of a chunk that is done, take on a disk."""
    folder = JobFolder(home / "job")
    folder.begin({"units": {}})
    who = this_worker()
    claims = Claims(ClaimFiles(folder.claims, who.name), who, 60.0)
    begun = time.perf_counter()
    for unit in range(count):
        claims.take(unit)
        claims.release(unit)
    claimed = time.perf_counter()
    for unit in range(count):
        folder.commit(unit, {"rows": [0, 1], "crc32": {"attr.observation": 1}})
    return {"claim": (claimed - begun) / count, "commit": (time.perf_counter() - claimed) / count}


FRAME = 4 * 84 * 84
KEPT = {
    "float32": 4.0 * FRAME,
    "bfloat16": 2.0 * FRAME,
    "compressed, 81 % zeros": (1 / 8 + 0.19 * 4) * FRAME,
    "summed over frames, bfloat16": 2.0 * 84 * 84,
    "reduced only": 0.0,
}
"""Bytes that are written of a frame."""


def scaling(frames_per_second: float, cores: int, reads: float, writes: float) -> Iterator[str]:
    """Rows of a table: frames per second on so many machines, and what decides it.

    Args:
        frames_per_second: of one core.
        cores: of a machine.
        reads: bytes per second that the storage gives, to all.
        writes: bytes per second that it takes, of all.
    """
    machines = (1, 2, 4, 8, 16, 32, 64)
    yield (
        "| kept of a frame | "
        + " | ".join(f"{one} machines" if one > 1 else "1 machine" for one in machines)
        + " |"
    )
    yield "|---|" + "---|" * len(machines)
    protocol = {
        one: simulate(Case("", one * cores, one, 50 * one * cores, slow=0.05)).efficiency for one in machines
    }
    for name, size in KEPT.items():
        found = []
        for one in machines:
            work = frames_per_second * cores * one * protocol[one]
            storage = min(reads / FRAME, writes / size if size else math.inf)
            found.append(f"{min(work, storage):,.0f}{'' if work <= storage else ' (storage)'}")
        yield f"| {name} | " + " | ".join(found) + " |"


def main(given: list[str] | None = None) -> None:
    """Print the tables that the documentation shows."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.swarm", description=__doc__)
    made.add_argument(
        "--frames", type=float, default=700.0, help="explained by a core in a second (benchmarks.jobs)"
    )
    made.add_argument("--cores", type=int, default=16, help="of a machine")
    made.add_argument("--reads", type=float, default=5e9, help="bytes per second of the storage")
    made.add_argument("--writes", type=float, default=2e9, help="bytes per second of the storage")
    options = made.parse_args(given)
    say = sys.stdout.write
    say(
        "| 1,000 workers on 64 machines | efficiency | chunks done twice | operations per second |\n|---|---|---|---|\n"
    )
    for case in CASES:
        found = simulate(case)
        say(
            f"| {case.name} | {found.efficiency:.1%} | {found.twice} of {case.chunks:,} | "
            f"{found.operations_per_second:,.0f} |\n"
        )
        sys.stdout.flush()
    with tempfile.TemporaryDirectory() as home:
        pieces = measured_pieces(Path(home))
    say("\n" + ", ".join(f"{name}: {1000 * seconds:.2f} ms" for name, seconds in pieces.items()) + "\n\n")
    for line in scaling(options.frames, options.cores, options.reads, options.writes):
        say(f"{line}\n")


if __name__ == "__main__":
    main()
