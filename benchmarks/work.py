"""What an explanation has to do at least: products, bytes moved, and the rates at which this machine does either."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks.timing import Contender

__all__ = ["machine_rates", "parallel_speedup", "utilisation", "work"]


class Counter(TorchDispatchMode):
    """Counts the bytes that operations read and write (views move none), and what products compute."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.flop = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        if not function.is_view:
            touched = tree_leaves((args, kwargs, out))
            self.bytes += sum(x.nbytes for x in touched if isinstance(x, Tensor))
        products = flop_registry.get(function._overloadpacket)
        if products:
            self.flop += products(*args, **kwargs, out_val=out)
        return out


def work(contender: Contender, td: TensorDict) -> dict[str, float]:
    """Operations of matrix products and convolutions, and bytes moved, of one call."""
    with Counter() as count:
        contender.explain(td.detach())
    return {"gflop": count.flop / 1e9, "gigabytes": count.bytes / 1e9}


def machine_rates(device: str, size: int) -> dict[str, float]:
    """The best of several copies of ``8 * size**2`` numbers and products of two square matrices, single precision."""
    a, b, out = (torch.rand(size, size, device=device) for _ in range(3))
    large, copy = (torch.empty(8 * size**2, device=device) for _ in range(2))
    copying = best(lambda: copy.copy_(large), device)
    product = best(lambda: torch.mm(a, b, out=out), device)
    return {
        "copy_gigabytes_per_s": 2 * large.nbytes / copying / 1e9,
        "matmul_gflop_per_s": 2 * size**3 / product / 1e9,
    }


def parallel_speedup(size: int = 1024, runs: int = 7) -> float:
    """How much faster a product is on all of torch's threads than on one, at present.

    Threads wait for each other by spinning: where another program has one of their cores, two can be several times
    slower than one. Neither a ratio of times nor processor time, which spinning takes too, would show it.
    """
    a, b = torch.rand(size, size), torch.rand(size, size)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = statistics.median(seconds(lambda: a @ b, "cpu", runs))
    finally:
        torch.set_num_threads(threads)
    return alone / statistics.median(seconds(lambda: a @ b, "cpu", runs))


def best(function: Callable[[], object], device: str, runs: int = 10) -> float:
    """The least time in seconds."""
    return min(seconds(function, device, runs))


def seconds(function: Callable[[], object], device: str, runs: int) -> list[float]:
    """The time of each of several calls, after one that does not count."""
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    times = []
    for _ in range(runs + 1):
        wait()
        start = time.perf_counter()
        function()
        wait()
        times.append(time.perf_counter() - start)
    return times[1:]


def utilisation(entry: dict[str, float], rates: dict[str, float]) -> tuple[float, float]:
    """The shares of the machine's own copy and product rates that a contender reached."""
    seconds = entry["wall_ms"] / 1e3
    return (
        entry["gigabytes"] / seconds / rates["copy_gigabytes_per_s"],
        entry["gflop"] / seconds / rates["matmul_gflop_per_s"],
    )
