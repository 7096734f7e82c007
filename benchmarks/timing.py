"""Interleaved timing: contenders take turns in one process, so that a busy moment of the machine hits all alike."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from tensordict import TensorDict
from torch import Tensor

__all__ = ["Contender", "Times", "cpu_ratio", "interleaved", "quartiles", "ratios"]

# A turn is several calls, so that clocks and caches that the contender before has filled do not matter.
TURN_SECONDS = 0.02
MOST_CALLS = 100
FEWEST_ROUNDS = 5


@dataclass(frozen=True)
class Contender:
    """One way to explain: from inputs to relevance.

    Attributes:
        explain: the call that is timed.
        around: entered around each turn, untimed, by what changes things that others share.
    """

    explain: Callable[[TensorDict], Tensor]
    around: Callable[[], AbstractContextManager[object]] = nullcontext

    def relevance(self, td: TensorDict) -> Tensor:
        """Explain once; the result outlasts later calls, which may reuse its memory."""
        with self.around():
            return self.explain(td.detach()).detach().clone()


@dataclass
class Times:
    """Seconds per call, one value per round; ``cpu`` is the time of all cores together."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


def interleaved(
    contenders: Mapping[str, Contender], td: TensorDict, seconds: float, rounds: int = FEWEST_ROUNDS
) -> dict[str, Times]:
    """Let contenders take turns, in an order that changes, for that long and for so many rounds at least."""
    calls = {name: _calls_per_turn(contender, td) for name, contender in contenders.items()}
    times = {name: Times() for name in contenders}
    order = list(contenders)
    shuffle = random.Random(0).shuffle
    gc.collect()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or any(len(t.wall) < rounds for t in times.values()):
        shuffle(order)
        for name in order:
            wall, cpu = _turn(contenders[name], td, calls[name])
            times[name].wall.append(wall)
            times[name].cpu.append(cpu)
    return times


def _calls_per_turn(contender: Contender, td: TensorDict) -> int:
    """How many calls make a turn; they warm the contender up too."""
    for _ in range(2):
        _turn(contender, td, 1)
    wall, _ = _turn(contender, td, 1)
    return max(1, min(MOST_CALLS, round(TURN_SECONDS / wall)))


def _turn(contender: Contender, td: TensorDict, calls: int) -> tuple[float, float]:
    """Wall and processor seconds per call."""
    inputs = [td.detach() for _ in range(calls)]  # new tensors: some libraries make theirs require gradients
    measure = _on_gpu if td["observation"].is_cuda else _on_cpu
    with contender.around():
        start = time.process_time()
        wall = measure(contender.explain, inputs)
        return wall / calls, (time.process_time() - start) / calls


def _on_cpu(explain: Callable[[TensorDict], Tensor], inputs: Iterable[TensorDict]) -> float:
    start = time.perf_counter()
    for td in inputs:
        explain(td)
    return time.perf_counter() - start


def _on_gpu(explain: Callable[[TensorDict], Tensor], inputs: Iterable[TensorDict]) -> float:
    """By the GPU's own events, around calls that queue up as they do in a loop."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for td in inputs:
        torch.compiler.cudagraph_mark_step_begin()
        explain(td)
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def quartiles(values: Iterable[float]) -> list[float]:
    """The lower quartile, the median and the upper quartile."""
    values = list(values)
    if len(values) < 2:
        return 3 * values
    return statistics.quantiles(values, n=4, method="inclusive")


def ratios(times: Times, base: Times) -> list[float]:
    """Quartiles of the ratios of each round, in which both met the same machine."""
    return quartiles(ours / theirs for ours, theirs in zip(times.wall, base.wall, strict=True))


def cpu_ratio(times: Times, base: Times) -> float:
    """The ratio of the medians of processor time."""
    return statistics.median(times.cpu) / statistics.median(base.cpu)
