"""What the tests of compiled explanations share: models, and graphs of their explanations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import nn

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


def observation(*batch, shape=(FEATURES,), **entries):
    return TensorDict(input=torch.randn(*batch, *shape).double(), **entries, batch_size=batch)


def assert_equal(ours, theirs):
    assert set(ours.keys(True, True)) == set(theirs.keys(True, True))
    for key in theirs.keys(True, True):
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-12, atol=1e-12)
