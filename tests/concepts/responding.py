"""A small policy that sees pictures, and what it saw."""

from __future__ import annotations

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from tdhook import LRP, Target

ROWS = 700
LAYER = "2"


def policy(seed: int = 0) -> TensorDictModule:
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ReLU(),
        nn.Conv2d(4, 6, 2), nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6 * 16, 3),
    )  # fmt: skip
    return TensorDictModule(net, ["pixels"], ["action_value"])


def steps(count: int = ROWS, seed: int = 1) -> TensorDict:
    torch.manual_seed(seed)
    found = TensorDict({"pixels": torch.randn(count, 2, 7, 7), "action": torch.randint(3, (count,))}, [count])
    found["step_count"] = torch.arange(count) % 50
    found["next", "reward"] = torch.randn(count, 1)
    return found


def method() -> LRP:
    return LRP("epsilon_plus", target=Target("action_value", "action"))
