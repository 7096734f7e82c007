"""What relevance passes through: models and calls."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import nn

from tdhook.attribution import (
    LRP,
    Averaged,
    Gradient,
    GradientTimesInput,
    IntegratedGradients,
    Noise,
)
from tdhook.targets import Target

OUTPUT = Target("output", "argmax")


class Residual(nn.Module):
    """Three blocks, the second of which has a branch around it."""

    def __init__(self, bias: bool = False):
        super().__init__()
        self.enter = nn.Linear(4, 6, bias=bias)
        self.inside = nn.Linear(6, 6, bias=bias)
        self.leave = nn.Linear(6, 3, bias=bias)

    def forward(self, x):
        h = F.relu(self.enter(x))
        return self.leave(h + torch.relu(self.inside(h)))


class Block(nn.Module):
    """A transformer block of torch's functions, ``[batch, tokens, width]``."""

    def __init__(self, width: int = 8, heads: int = 2):
        super().__init__()
        self.heads = heads
        self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 12), nn.Linear(12, width)
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.before(x)).chunk(3, -1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        x = x + self.down(F.gelu(self.up(self.after(x))))
        return self.head(x).sum(1)


def convolutional():
    layers = (nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(80, 3))
    return nn.Sequential(*layers)


def of(*shape, batch=1):
    return TensorDict({"input": torch.randn(*shape, dtype=torch.float64)}, shape[:batch])


def explain(method, model, td):
    return method.wrap(model.double())(td.clone())


def relevance(method, model, td):
    return explain(method, model, td)["attr", "input"]


METHODS = {
    "epsilon_plus": LRP("epsilon_plus"),
    "epsilon, the other flow": LRP("epsilon", flow="relevance"),
    "attn_lrp": LRP("attn_lrp"),
    "deeplift": LRP("deeplift", baseline=0.0),
    "relevance flow against data": LRP("epsilon", flow="relevance", baseline=0.3),
    "gradient times input": GradientTimesInput(),
    "gradient": Gradient(signed=True),
    "integrated gradients": IntegratedGradients(steps=5),
    "smooth": Averaged(GradientTimesInput(), Noise(0.1, 3)),
}
