"""Integrated gradients: peak memory over numbers of steps and budgets, and how many steps a tolerance takes.

``python -m benchmarks.paths`` prints both tables. Each figure of memory is from a process of its own. The fixed number
of steps is the smallest of :data:`FIXED` by Gauss-Legendre, captum's default, whose numbers ours are, for which the gap
of 95 % of the elements is below the tolerance; what that takes to be found is not counted. The error is that of the
map: the sum of what its entries are off, over the sum of their sizes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from benchmarks.machine import machine
from benchmarks.memory import _cpu_growth
from benchmarks.models import mlp, nature_cnn
from tdhook import Target
from tdhook.attribution import IntegratedGradients

MIB = 2**20
STEPS, BUDGETS = (32, 256, 2048), (16, 64, 256)
FIXED = (8, 16, 32, 50, 64, 100, 128, 200, 256, 512, 1024)
LEVELS = tuple(2**i + 1 for i in range(3, 11))
"""The steps that a tolerance stops at."""
TOLERANCE = 1e-3
CHECKPOINT = Path(__file__).parents[1] / "examples" / "agents" / "checkpoints" / "dqn.pt"


@dataclass
class Steps:
    """What a tolerance takes on one model: steps, and errors of the map."""

    model: str
    elements: int
    difference: float
    fixed: int | None
    median: float
    quartiles: tuple[float, float]
    mean: float
    error: float
    error_fixed: float
    error_of_32: float


def peak(steps: int, budget: int) -> float:
    """MiB that memory grows by at most: Nature CNN, batch 32."""
    torch.manual_seed(0)
    net = nature_cnn().eval().requires_grad_(False)
    method = IntegratedGradients(Target("output", 1), steps=steps, memory_budget=budget * MIB)
    explained = method.wrap(net)
    td = TensorDict({"input": torch.rand(32, 4, 84, 84)}, [32])
    few = IntegratedGradients(Target("output", 1), steps=2, memory_budget=0)
    few.wrap(net)(td.clone())  # what is made once is made before
    return _cpu_growth(lambda: explained(td))[0] / MIB


def memory() -> list[dict[str, float]]:
    """The peak for each number of steps and budget, each in a process of its own."""
    rows = []
    for budget in BUDGETS:
        for steps in STEPS:
            command = [sys.executable, "-m", "benchmarks.paths", "--one", str(steps), str(budget)]
            found = subprocess.run(command, check=True, capture_output=True, text=True)
            rows.append({"budget": budget, "steps": steps, "peak": float(found.stdout.split()[-1])})
            print(rows[-1], file=sys.stderr, flush=True)
    return rows


def _scaled(net: nn.Module, x: Tensor) -> nn.Module:
    """With values whose differences from those at zero have a median of one, as a trained model's have a size."""
    net = net.double().requires_grad_(False)
    last = [module for module in net.modules() if isinstance(module, nn.Linear)][-1]
    last.weight.div_((net(x) - net(0 * x))[:, 1].abs().median())
    return net


def models() -> Iterator[tuple[str, nn.Module, Tensor, int]]:
    """Networks of ReLUs, inputs, and the steps of which the true map is made."""
    torch.manual_seed(0)
    for width, depth in ((64, 2), (256, 2), (256, 4)):
        x = torch.randn(256, 17).double()
        yield f"MLP, {depth} layers of {width}", _scaled(mlp(width, depth), x), x, 8192
    x = torch.rand(12, 4, 84, 84).double()
    yield "Nature CNN", _scaled(nature_cnn(), x), x, 1024
    yield "Acrobot, trained (examples/agents/dqn.py)", *_acrobot(), 8192


def _acrobot() -> tuple[nn.Module, Tensor]:
    """A trained policy, and states of an arm: angles and speeds."""
    weights = torch.load(CHECKPOINT, weights_only=False)["weights"]
    layers = [value for key, value in weights.items() if key.endswith(("weight", "bias"))]
    net = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
    with torch.no_grad():
        for parameter, value in zip(net.parameters(), layers, strict=True):
            parameter.copy_(value)
    angles, speeds = 6.283 * torch.rand(256, 2), torch.randn(256, 2) * torch.tensor([2.0, 4.0])
    x = torch.stack([angles[:, 0].cos(), angles[:, 0].sin(), angles[:, 1].cos(), angles[:, 1].sin()], 1)
    return net.double().requires_grad_(False), torch.cat([x, speeds], 1).double()


def _map(net: nn.Module, x: Tensor, **options: object) -> tuple[Tensor, Tensor, Tensor]:
    """The map, the gap, and the difference of the target."""
    method = IntegratedGradients(Target("output", 1), ledger=True, **options)  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that a tolerance is not reached in so few steps
        found = method.wrap(net)(TensorDict({"input": x}, [len(x)]))
    return found["attr", "input"], found["ledger", "gap"].abs(), found["ledger", "target"].abs()


def steps_taken() -> list[Steps]:
    """How many steps a tolerance takes, and how many a fixed number has to be."""
    rows = []
    for name, net, x, many in models():
        true = _map(net, x, steps=many, rule="middle")[0]

        def error(found: Tensor, true: Tensor = true) -> float:
            return float((found - true).abs().sum() / true.abs().sum())

        fixed, at_fixed = None, float("nan")
        for count in FIXED:
            found, gap, difference = _map(net, x, steps=count)
            if (gap < TOLERANCE).double().mean() >= 0.95:
                fixed, at_fixed = count, error(found)
                break
        taken = torch.full((len(x),), float(LEVELS[-1])).double()
        for count in reversed(LEVELS[:-1]):
            gap = _map(net, x, tolerance=TOLERANCE, steps=count)[1]
            taken[gap <= TOLERANCE] = count
        ours = _map(net, x, tolerance=TOLERANCE)[0]
        low, median, high = taken.quantile(torch.tensor([0.25, 0.5, 0.75]).double()).tolist()
        errors = error(ours), at_fixed, error(_map(net, x)[0])
        size = float(difference.median())
        rows.append(Steps(name, len(x), size, fixed, median, (low, high), float(taken.mean()), *errors))
        print(rows[-1], file=sys.stderr, flush=True)
    return rows


def table_of_memory(rows: list[dict[str, float]]) -> str:
    """As Markdown."""
    lines = ["| budget, MiB | " + " | ".join(f"{steps} steps" for steps in STEPS) + " |", "| --- " * 4 + "|"]
    for budget in BUDGETS:
        peaks = [row["peak"] for row in rows if row["budget"] == budget]
        lines.append(f"| {budget} | " + " | ".join(f"{one:.1f}" for one in peaks) + " |")
    return "\n".join(lines)


def table_of_steps(rows: list[Steps]) -> str:
    """As Markdown."""
    head = (
        "model",
        "difference",
        "fixed steps",
        "steps by tolerance",
        "mean",
        "error, fixed",
        "error, tolerance",
    )
    lines = ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    for row in rows:
        low, high = row.quartiles
        fixed = f"more than {FIXED[-1]}" if row.fixed is None else f"{row.fixed}"
        at_fixed = "" if row.fixed is None else f"{row.error_fixed:.2%}"
        lines.append(
            f"| {row.model} | {row.difference:.2g} | {fixed} | **{row.median:.0f}** ({low:.0f} to {high:.0f}) | "
            f"{row.mean:.0f} | {at_fixed} | {row.error:.2%} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paths", description=__doc__)
    parser.add_argument("--only", choices=("memory", "steps"), help="one of the tables")
    parser.add_argument(
        "--one", nargs=2, type=int, metavar=("STEPS", "BUDGET"), help="a single figure of memory"
    )
    parser.add_argument("--json", type=Path, help="write the report to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.one:
        print(peak(*arguments.one))
        return
    report: dict[str, object] = {"machine": machine("cpu")}
    if arguments.only != "steps":
        rows = memory()
        print(table_of_memory(rows))
        report["memory"] = rows
    if arguments.only != "memory":
        steps = steps_taken()
        print(table_of_steps(steps))
        report["steps"] = [asdict(row) for row in steps]
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
