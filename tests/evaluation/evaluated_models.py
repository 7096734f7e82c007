"""Small models and their inputs, which the tests of curves share."""

from __future__ import annotations

import torch
from tensordict import TensorDict
from torch import nn


def linear(weights: list[float]) -> nn.Linear:
    """One output, the sum of weights times inputs."""
    module = nn.Linear(len(weights), 1, bias=False)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([weights]))
    return module


def inputs(*rows: list[float]) -> TensorDict:
    return TensorDict({"input": torch.tensor(rows)}, batch_size=[len(rows)])


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))


def random_inputs(*batch: int, features: int = 5) -> TensorDict:
    return TensorDict({"input": torch.randn(*batch, features)}, batch_size=list(batch))
