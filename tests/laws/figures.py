"""Figures of the house, by which it can be compared with itself: ``python tests/laws/figures.py``.

- circles: numbers of files that import each other, imports in functions included
- upwards: imports that run against the order of ``sources.ORDER``
- hidden: imports of the package in functions, those of commands aside
- Any: how often it stands somewhere, per 1000 lines
- reach-through: ``x._name`` of a named ``x`` other than ``self`` and ``cls``, per 1000 lines
- the walk of one call: how many functions of the package one warm call of an explained MLP (17-256-6, ``epsilon_plus``,
  batch 1) calls, in how many files, and how often the file changes from one to the next
"""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path
from types import FrameType

import torch
from sources import Sources, circles, level
from tensordict import TensorDict
from torch import nn

import tdhook
from tdhook import LRP, Target

HOME = Path(tdhook.__file__).parent


def of_the_source() -> dict[str, str]:
    """What its syntax tells."""
    sources = Sources.of(HOME)
    thousands = sources.lines / 1000
    upwards = [edge for edge in sources.edges if level(edge.to) > level(edge.source)]
    hidden = [edge for edge in sources.edges if edge.hidden and not edge.source.startswith("tdhook.cli")]
    return {
        "files": str(len(sources.texts)),
        "lines": str(sources.lines),
        "circles": str([len(circle) for circle in circles(sources.graph())] or 0),
        "upwards": str(len(upwards)),
        "hidden": str(len(hidden)),
        "Any per 1000 lines": f"{sources.uses_of_any() / thousands:.1f}",
        "reach-through per 1000 lines": f"{len(sources.reaches()) / thousands:.1f}",
    }


def of_one_call() -> dict[str, str]:
    """What is walked through."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(17, 256), nn.ReLU(), nn.Linear(256, 6))
    explained = LRP("epsilon_plus", target=Target("output", "argmax")).wrap(model)
    tds = [TensorDict({"input": torch.ones(1, 17)}, batch_size=[1]) for _ in range(3)]
    for td in tds[:2]:
        explained(td)
    files: list[str] = []

    def note(frame: FrameType, event: str, argument: object) -> None:
        name = frame.f_code.co_filename
        if event == "call" and Path(name).is_relative_to(HOME):
            files.append(name)

    sys.setprofile(note)
    try:
        explained(tds[2])
    finally:
        sys.setprofile(None)
    changes = sum(a != b for a, b in pairwise(files))
    return {
        "functions per call": str(len(files)),
        "files per call": str(len(set(files))),
        "changes of file per call": str(changes),
    }


def main() -> None:
    """Print them."""
    for name, figure in {**of_the_source(), **of_one_call()}.items():
        print(f"{name:32}{figure}")  # noqa: T201


if __name__ == "__main__":
    main()
