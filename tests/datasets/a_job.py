"""A small job, the same in every process."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import nn

from tdhook import LRP, Target
from tdhook.datasets import Histogram, Job, Moments, Reservoir, TopRows

ROWS = 600
SECONDS, HURRY = "A_JOB_SECONDS", "A_JOB_HURRY"
"""How long each stretch of rows takes, until there is such a file."""
OF_ALL = ["claims", "workers"]
"""What of a folder tells who was at work."""


def policy(seed: int = 0) -> TensorDictModule:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
    return TensorDictModule(net, ["observation"], ["action_value"])


def steps(count: int = ROWS) -> TensorDict:
    torch.manual_seed(1)
    return TensorDict({"observation": torch.randn(count, 4), "action": torch.randint(3, (count,))}, [count])


def slowly(rows: TensorDictBase) -> TensorDictBase:
    """Takes so many seconds for each stretch of rows, which nobody is told."""
    if not os.path.exists(os.environ.get(HURRY, "")):
        time.sleep(float(os.environ.get(SECONDS, 0)))
    return rows


def a_job(out: str | Path, source: Any = None, **options: Any) -> Job:
    options = {"chunk": 16, "at_once": 8, "keep": "all", **options}
    reduce = [Moments(by="action"), Histogram(), TopRows(3), Reservoir(7)]
    method = LRP("epsilon_plus", target=Target("action_value", "action"))
    source = steps() if source is None else source
    return Job(method, policy(), source, out, reduce=reduce, prepare=slowly, **options)


def bytes_of(home: Path) -> dict[str, bytes]:
    """All that is in a job folder, but who was at work."""
    paths = [path for path in sorted(home.rglob("*")) if path.is_file()]
    names = {str(path.relative_to(home)): path for path in paths}
    return {name: path.read_bytes() for name, path in names.items() if Path(name).parts[0] not in OF_ALL}


def same(a: Path, b: Path) -> None:
    """Say which files differ, if some do."""
    ours, theirs = bytes_of(a), bytes_of(b)
    assert sorted(ours) == sorted(theirs)
    assert [name for name in ours if ours[name] != theirs[name]] == []
