"""Jobs: a policy, steps of it, and the job that explains them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import nn

from tdhook import LRP, Target
from tdhook.datasets import Job

ATTR = ("attr", "observation")


def policy(seed: int = 0) -> TensorDictModule:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
    return TensorDictModule(net, ["observation"], ["action_value"])


def steps(count: int = 100) -> TensorDict:
    torch.manual_seed(1)
    return TensorDict(
        {
            "observation": torch.randn(count, 4),
            "action": torch.randint(3, (count,)),
            "is_init": (torch.arange(count) % 17 == 0)[:, None],
            "next": {"observation": torch.randn(count, 4), "reward": torch.randn(count, 1)},
        },
        [count],
    )


def job(out: Path, method: LRP | None = None, source: Any = None, **options: Any) -> Job:
    method = LRP("epsilon_plus", target=Target("action_value", "action")) if method is None else method
    options = {"chunk": 16, "at_once": 8, **options}
    return Job(method, policy(), steps() if source is None else source, out, **options)


def rows_of(done: Job) -> TensorDictBase:
    assert done.work().finished
    return done.result().rows
