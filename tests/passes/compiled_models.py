"""What the tests of compiled explanations share: models, and graphs of their explanations."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import nn

from tdhook import preset
from tdhook.attribution.lrp_helpers import rules as r
from tdhook.models.layers import Sum

FEATURES = 6


def compiled(explained, backend="aot_eager", **options):
    return torch.compile(explained, fullgraph=True, backend=backend, **options)


def dense(middle=None):
    return nn.Sequential(nn.Linear(FEATURES, 9), middle or nn.ReLU(), nn.Linear(9, 3)).double()


def image():
    layers = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.AvgPool2d(2), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(4, 3)).double().eval()


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(FEATURES, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        h = F.gelu(self.first(x))
        return self.last(h + self.inner(self.norm(h)))


class Recurrent(nn.Module):
    def __init__(self, cell):
        super().__init__()
        self.cell, self.out = cell(FEATURES, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x):
        return self.out(self.cell(x)[0][:, -1])


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.into, self.out = nn.Linear(FEATURES, 8), nn.Linear(8, 3)
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        h = self.into(x)
        h = h + self.attend(h, h, h, need_weights=False)[0]
        return self.out(F.silu(h).mean(-2))


def some(cases, quick):
    """All cases as parameters; those that are not quick wait for --slow."""
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in cases]


def linear(rule):
    return [(nn.Linear, rule)]


RULES = {
    "epsilon": (linear(r.EpsilonRule(1e-3)), dense),
    "epsilon without bias": (linear(r.EpsilonRule(zero_params="bias")), dense),
    "uniform epsilon": (linear(r.UniformEpsilonRule()), dense),
    "gamma": (linear(r.GammaRule()), dense),
    "alpha-beta": (linear(r.AlphaBetaRule()), dense),
    "z-plus": (linear(r.ZPlusRule()), dense),
    "z-box": (linear(r.ZBoxRule(-4.0, 4.0)), dense),
    "w-square": (linear(r.WSquareRule()), dense),
    "flat": (linear(r.FlatRule()), dense),
    "stop": ([(nn.Tanh, r.StopRule()), (nn.Linear, r.EpsilonRule())], lambda: dense(nn.Tanh())),
    "pass": ([(nn.Tanh, r.PassRule()), (nn.Linear, r.EpsilonRule())], lambda: dense(nn.Tanh())),
    "uniform": ([(nn.Tanh, r.UniformRule()), (nn.Linear, r.EpsilonRule())], lambda: dense(nn.Tanh())),
    "pseudo-identity": ([(nn.GELU, r.PseudoIdentityRule())], lambda: dense(nn.GELU())),
    "layer norm": ([(nn.LayerNorm, r.LayerNormRule())], lambda: dense(nn.LayerNorm(9))),
    "packed projection": ([(nn.Linear, r.AHQKVRule())], lambda: nn.Linear(FEATURES, 9).double()),
    "softmax": (
        [(nn.Softmax, r.SoftmaxEpsilonRule()), (nn.Linear, r.EpsilonRule())],
        lambda: dense(nn.Softmax(-1)),
    ),
    "norm": ([(Sum, r.NormRule())], lambda: nn.Sequential(nn.Unflatten(-1, (3, 2)), Sum(-1))),
    "recurrent": (preset("lstm_lrp"), lambda: Recurrent(nn.GRU).double()),
    "attention": (preset("attn_lrp"), lambda: Attention().double()),
}


def observation(*batch, shape=(FEATURES,), **entries):
    return TensorDict(input=torch.randn(*batch, *shape).double(), **entries, batch_size=batch)


def assert_equal(ours, theirs):
    assert set(ours.keys(True, True)) == set(theirs.keys(True, True))
    for key in theirs.keys(True, True):
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-12, atol=1e-12)
