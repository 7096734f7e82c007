"""Several references: what they take at once, one after the other, and with captum's DeepLiftShap.

``python -m benchmarks.references`` prints the table: medians in milliseconds, taken in turns in one process.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from tensordict import TensorDict
from torch import nn

from benchmarks.machine import machine
from benchmarks.models import mlp, nature_cnn
from tdhook import LRP, References, Target

COUNTS = (1, 8, 32, 128)
CASES = {"MLP 17-256-256-6": (mlp, (17,), (1, 16, 256)), "Nature CNN": (nature_cnn, (4, 84, 84), (1, 8, 32))}


def contenders(
    net: nn.Module, td: TensorDict, data: TensorDict, samples: int
) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    over = References("sample", samples, data)
    found: dict[str, Callable[[], object]] = {}
    for name, options in {"at once": {}, "in turn": {"memory_budget": 1}}.items():
        explained = LRP("deeplift", target=Target("output", 1), baseline=over, **options).wrap(net)
        found[name] = lambda explained=explained: explained(td.copy())
    try:
        from captum.attr import DeepLiftShap
    except ImportError:
        return found
    shap = DeepLiftShap(net)
    x, drawn = td["input"], data["input"][: max(2, samples)]  # it takes two at least
    found["captum"] = lambda: shap.attribute(x.clone().requires_grad_(), drawn, target=1)
    return found


def timed(contending: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The median of each in milliseconds."""
    took: dict[str, list[float]] = {name: [] for name in contending}
    for number in range(rounds + 1):
        for name, run in contending.items():
            start = time.perf_counter()
            run()
            if number:
                took[name].append(1e3 * (time.perf_counter() - start))
    return {name: median(each) for name, each in took.items()}


def main() -> None:
    """Print the table."""
    asked = argparse.ArgumentParser(prog="python -m benchmarks.references", description=__doc__)
    asked.add_argument("--rounds", type=int, default=7)
    rounds = asked.parse_args().rounds
    print(machine("cpu"))
    for model, (make, shape, batches) in CASES.items():
        torch.manual_seed(0)
        net = make().eval().requires_grad_(False)
        data = TensorDict({"input": torch.rand(256, *shape)}, [256])
        for rows in batches:
            td = TensorDict({"input": torch.rand(rows, *shape)}, [rows])
            for samples in COUNTS:
                found = timed(contenders(net, td, data, samples), rounds)
                told = ", ".join(f"{name} {value:.1f} ms" for name, value in found.items())
                print(f"{model}, batch {rows}, {samples} references: {told}", flush=True)


if __name__ == "__main__":
    main()
