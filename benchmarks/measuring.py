"""One line of the table: contenders made, called for the first time, compared, timed in turns."""

from __future__ import annotations

import dataclasses
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.contenders import (
    FLOOR,
    FLOOR_COMPILED,
    ONE_EXPLANATION,
    OURS,
    OURS_COMPILED,
    fresh_compiler,
    own,
    start_compiler,
)
from benchmarks.library_models import Unavailable
from benchmarks.peers import peers
from benchmarks.timing import Contender, Times, cpu_ratio, interleaved, ratios
from benchmarks.work import parallel_speedup, work

__all__ = ["BASES", "Settings", "measure", "summary"]

# What others are divided by.
BASES = (FLOOR, FLOOR_COMPILED, ONE_EXPLANATION, OURS, OURS_COMPILED)
Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        seconds: to spend on the timing of each case, at least.
        device: where.
        compiled: whether to compile too.
        peers: whether to time other libraries too.
    """

    seconds: float = 3.0
    device: str = "cpu"
    compiled: bool = True
    peers: bool = True

    def on(self, device: str) -> Settings:
        """The same elsewhere."""
        return dataclasses.replace(self, device=device)


def measure(case: Case, settings: Settings) -> Row:
    """Time all that can explain a case here; what cannot is in the row with the reason."""
    row: Row = {
        "case": case.name,
        "preset": case.preset,
        "device": settings.device,
        "aim": {name: aim for name, aim in dataclasses.asdict(case.aim).items() if aim},
    }
    td = case.data(settings.device)
    makes = own(case, settings.device, settings.compiled)
    if settings.peers:
        makes |= peers(case, settings.device)
    if settings.compiled:
        start_compiler()
    with fresh_compiler():
        started = start(makes, td)
        ready = {name: first.contender for name, first in started.items() if first.contender}
        if FLOOR not in ready:
            return row | {"missing": started[FLOOR].missing}
        before = parallel_speedup()
        times = interleaved(ready, td, settings.seconds)
        row["parallel_speedup"] = min(before, parallel_speedup())
        counts = {name: work(ready[name], td) for name in (FLOOR, OURS) if name in ready}
    row["contenders"] = {
        name: first.entry(started[OURS]) | summary(name, times) | counts.get(name, {})
        for name, first in started.items()
    }
    return row


@dataclass(frozen=True)
class First:
    """A contender and its first call, or why there is none.

    Attributes:
        contender: what can be timed.
        missing: why nothing can.
        seconds: that it took to be made and called for the first time.
        relevance: what it found.
        notes: what it warned of.
    """

    contender: Contender | None = None
    missing: str = ""
    seconds: float = 0.0
    relevance: Tensor | None = None
    notes: tuple[str, ...] = ()

    def entry(self, ours: First) -> Row:
        """What is reported of it, beside its times."""
        if self.contender is None:
            return {"missing": self.missing}
        found: Row = {"first_call_s": self.seconds}
        if self.notes:
            found["notes"] = list(self.notes)
        if ours.relevance is not None and self.relevance.shape == ours.relevance.shape:
            found["cosine"] = cosine(self.relevance, ours.relevance)
        return found


def start(makes: Mapping[str, Callable[[], Contender]], td: Any) -> dict[str, First]:
    """Make each contender and call it once."""
    return {name: _start(make, td) for name, make in makes.items()}


def _start(make: Callable[[], Contender], td: Any) -> First:
    begin = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            contender = make()
            relevance = contender.relevance(td)
        except Unavailable as reason:
            return First(missing=str(reason))
        except Exception as error:  # whatever a library raises is its answer to this case
            return First(missing=f"{type(error).__name__}: {str(error).strip().splitlines()[0][:150]}")
    own = (w.message for w in caught if not issubclass(w.category, DeprecationWarning))  # others are torch's
    notes = tuple(dict.fromkeys(str(message).splitlines()[0] for message in own))
    return First(contender, "", time.perf_counter() - begin, relevance, notes)


def cosine(relevance: Tensor, ours: Tensor) -> float:
    """How alike two explanations are: the mean cosine over the batch, which no scale of a sample changes."""
    a, b = (r.flatten(1).double() for r in (relevance, ours))
    return torch.cosine_similarity(a, b).mean().item()


def summary(name: str, times: Mapping[str, Times]) -> Row:
    """Medians in milliseconds, and for each base that was timed the quartiles of the ratio to it."""
    if name not in times:
        return {}
    mine = times[name]
    bases = [base for base in BASES if base in times and base != name]
    return {
        "wall_ms": 1e3 * statistics.median(mine.wall),
        "cpu_ms": 1e3 * statistics.median(mine.cpu),
        "rounds": len(mine.wall),
        "ratio": {base: ratios(mine, times[base]) for base in bases},
        "cpu_ratio": {base: cpu_ratio(mine, times[base]) for base in bases},
    }
