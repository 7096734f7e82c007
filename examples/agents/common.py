"""What the scripts of this folder share: one per kind of agent, each with the checkpoint that it trained.

    python examples/agents/NAME.py                # explain the agent of the checkpoint, draw agents-output/NAME.png
    python examples/agents/NAME.py --train        # train it again, with its seed, and write the checkpoint

A script gives :func:`main` two functions: ``train(seed)`` returns a checkpoint as plain data (``"weights"``, a state
dict or several by name, and ``"facts"``: seed, frames, mean return, ...), and ``explain(checkpoint, seed)`` lets the
agent act in its environment and explains it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from tensordict import TensorDictBase

CHECKPOINTS = Path(__file__).parent / "checkpoints"
LARGEST_GAP = 1e-4
"""What may be unaccounted for, in single precision, as a share of what is explained."""


@dataclass(frozen=True)
class Shown:
    """What came of explaining an agent.

    Attributes:
        figure: the picture.
        gap: the largest share of relevance that was lost or made, see :func:`gap`.
        lines: what to print: the return of the episode, what mattered, in words and numbers.
    """

    figure: Figure
    gap: float
    lines: list[str]


def gap(explained: TensorDictBase) -> float:
    """Relevance that the ledger misses in any element of the batch, as a share of the mean size of the target.

    Args:
        explained: what a method with ``ledger=True`` returned.
    """
    ledger = explained["ledger"]
    size = ledger["target"].double().abs().mean().clamp(min=torch.finfo(torch.float64).tiny)
    return (ledger["gap"].double().abs().max() / size).item()


def main(
    name: str, train: Callable[[int], dict[str, Any]], explain: Callable[[dict[str, Any], int], Shown]
) -> None:
    """Run a script; it fails where the ledger does not close."""
    parser = argparse.ArgumentParser(description=f"The agent {name!r}: train it, or explain what it does.")
    parser.add_argument("--train", action="store_true", help="train it again, and write its checkpoint")
    parser.add_argument("--seed", type=int, default=0, help="of every random number (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("agents-output"), help="where the picture goes")
    arguments = parser.parse_args()

    torch.set_num_threads(1)  # the networks are too small to gain from more
    torch.manual_seed(arguments.seed)
    path, start = CHECKPOINTS / f"{name}.pt", time.perf_counter()
    if arguments.train:
        torch.save(train(arguments.seed), path)
        print(f"wrote {path} ({path.stat().st_size / 1e3:.0f} kB, {time.perf_counter() - start:.0f} s)")
        return
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    shown = explain(checkpoint, arguments.seed)
    for line in (*(f"{key}: {value}" for key, value in checkpoint["facts"].items()), *shown.lines):
        print(line)
    arguments.out.mkdir(parents=True, exist_ok=True)
    picture = arguments.out / f"{name}.png"
    shown.figure.savefig(picture, dpi=100)
    print(f"ledger gap: {shown.gap:.1e} of the target (limit {LARGEST_GAP:g})")
    print(f"wrote {picture} ({time.perf_counter() - start:.0f} s)")
    if not shown.gap < LARGEST_GAP:
        sys.exit(f"{name}: relevance was lost or made")
