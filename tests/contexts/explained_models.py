"""What the tests of contexts share: models, and how they are explained."""

from __future__ import annotations

from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn

from tdhook import LRP
from tdhook.models.families import Linear
from tdhook.rules import (
    EpsilonRule,
    PassRule,
)

EXACT = [(Linear, EpsilonRule(1e-12)), ((nn.ReLU, nn.Tanh), PassRule())]


def mlp(n_in=3, n_out=4, bias=False):
    net = nn.Sequential(nn.Linear(n_in, 8, bias=bias), nn.ReLU(), nn.Linear(8, n_out, bias=bias))
    return net.double()


def explain(model, td, composite=EXACT, **kwargs):
    with LRP(composite, **kwargs).prepare(model) as explained:
        return explained(td)


def chain():
    return TensorDictSequential(
        TensorDictModule(mlp(3, 5), ["obs"], [("hidden", "state")]),
        TensorDictModule(mlp(5, 5), [("hidden", "state")], ["belief"]),
        TensorDictModule(mlp(5, 2), ["belief"], ["q"]),
    )
