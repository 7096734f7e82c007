"""What the tests of tdhook 0.3's interface share."""

from __future__ import annotations

import torch
from torch import nn


def fixed():
    """A network whose relevance is known in figures."""
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    weights = {
        "0.weight": torch.tensor([[1.0, -2.0], [3.0, 1.0]]),
        "0.bias": torch.tensor([0.5, -1.0]),
        "2.weight": torch.tensor([[1.0, 1.0], [-1.0, 2.0]]),
        "2.bias": torch.tensor([0.25, 0.0]),
    }
    net.load_state_dict(weights)
    return net


X = torch.tensor([[1.0, 0.25], [2.0, -1.0], [-1.0, -1.0]])


def mlp():
    return nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 4))


def values(targets, extra):
    """The usual ``init_attr_grads``: relevance is the value of the output."""
    return targets.clone().detach()


def run(lrp, model, td, *keys):
    with lrp.prepare(model, *keys) as hooked:
        return hooked(td)
