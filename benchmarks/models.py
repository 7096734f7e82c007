"""The models that are timed: what agents and language models are made of, in plain torch."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["gpt2", "llama", "lstm_policy", "mlp", "nature_cnn", "residual_cnn"]


def mlp(width: int = 256, depth: int = 2) -> nn.Module:
    """From 17 features, through ``depth`` hidden layers, to 6 action values."""
    sizes = (17, *depth * (width,), 6)
    layers: list[nn.Module] = []
    for width_in, width_out in itertools.pairwise(sizes):
        layers += [nn.Linear(width_in, width_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def nature_cnn(actions: int = 6) -> nn.Module:
    """The network that played Atari games (Mnih et al. 2015)."""
    return nn.Sequential(
        nn.Conv2d(4, 32, 8, stride=4),
        nn.ReLU(),
        nn.Conv2d(32, 64, 4, stride=2),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(3136, 512),
        nn.ReLU(),
        nn.Linear(512, actions),
    )


class Block(nn.Module):
    """The basic block of a ResNet, which overwrites what it can, as torchvision's does."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride > 1 or channels_in != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        z = self.relu(self.bn1(self.conv1(x)))
        z = self.bn2(self.conv2(z))
        z += shortcut
        return self.relu(z)


def residual_cnn() -> nn.Module:
    """A ResNet-18 for small images, half as wide."""
    blocks: list[nn.Module] = []
    for channels_in, channels, stride in ((32, 32, 1), (32, 64, 2), (64, 128, 2), (128, 256, 2)):
        blocks += [Block(channels_in, channels, stride), Block(channels, channels, 1)]
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(inplace=True),
        *blocks,
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10),
    )  # fmt: skip


class LSTMPolicy(nn.Module):
    """Action values after a sequence of observations."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(32, 128)
        self.lstm = nn.LSTM(128, 128, batch_first=True)
        self.head = nn.Linear(128, 6)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.lstm(torch.relu(self.encoder(x)))
        values: Tensor = self.head(states[:, -1])
        return values


lstm_policy = LSTMPolicy


class GPT2Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.act = nn.GELU(approximate="tanh")

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.ln_1(x)).chunk(3, -1)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(self.act(self.up(self.ln_2(x))))


class RMSNorm(nn.Module):
    """Written out by hand, as it is in language models."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class LlamaLayer(nn.Module):
    """Rotary positions, grouped queries, a gated MLP."""

    def __init__(self, width: int, heads: int, groups: int, inside: int) -> None:
        super().__init__()
        self.heads, self.groups = heads, groups
        self.ln_1, self.ln_2 = RMSNorm(width), RMSNorm(width)
        shared = width * groups // heads
        self.q, self.k, self.v = (nn.Linear(width, n, bias=False) for n in (width, shared, shared))
        self.out = nn.Linear(width, width, bias=False)
        self.gate, self.up = (nn.Linear(width, inside, bias=False) for _ in range(2))
        self.down = nn.Linear(inside, width, bias=False)
        self.act = nn.SiLU()
        frequencies = 10_000.0 ** -torch.arange(0, 1, 2 * heads / width)
        self.register_buffer("frequencies", frequencies.repeat(2))

    def rotate(self, x: Tensor) -> Tensor:
        angles = torch.arange(x.shape[-2], device=x.device)[:, None] * self.frequencies
        first, second = x.chunk(2, -1)
        return x * angles.cos() + torch.cat((-second, first), -1) * angles.sin()

    def forward(self, x: Tensor) -> Tensor:
        h = self.ln_1(x)
        q = self.q(h).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = (f(h).unflatten(-1, (self.groups, -1)).transpose(1, 2) for f in (self.k, self.v))
        k, v = (part.repeat_interleave(self.heads // self.groups, 1) for part in (self.rotate(k), v))
        attended = F.scaled_dot_product_attention(self.rotate(q), k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        h = self.ln_2(x)
        return x + self.down(self.act(self.gate(h)) * self.up(h))


class Transformer(nn.Module):
    """From embedded tokens to the logits of the next one."""

    def __init__(self, layers: list[nn.Module], norm: nn.Module, width: int, vocabulary: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = norm
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.head(self.norm(x)[:, -1])
        return logits


def gpt2(width: int = 768, depth: int = 6, vocabulary: int = 50_257) -> nn.Module:
    layers: list[nn.Module] = [GPT2Layer(width, width // 64) for _ in range(depth)]
    return Transformer(layers, nn.LayerNorm(width), width, vocabulary)


def llama() -> nn.Module:
    return Transformer([LlamaLayer(512, 8, 4, 1408) for _ in range(8)], RMSNorm(512), 512, 32_000)
