"""Sparse autoencoders, and a policy that they are spliced into."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from tdhook import LRP, Target
from tdhook.composites import PRESETS


class Autoencoder(nn.Module):
    """Sparse autoencoders as they are written: ``kind`` says what keeps them sparse."""

    def __init__(self, width: int, features: int, kind: str = "relu", seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.encoder, self.decoder = nn.Linear(width, features), nn.Linear(features, width)
        self.kind = kind

    def encode(self, h: Tensor) -> Tensor:
        z = self.encoder(h - self.decoder.bias)
        if self.kind == "jumprelu":
            return z * (z > 0.2)
        z = torch.relu(z)
        if self.kind == "topk":
            values, index = z.topk(4, -1)
            return torch.zeros_like(z).scatter_(-1, index, values)
        return z

    def decode(self, features: Tensor) -> Tensor:
        made: Tensor = self.decoder(features)
        return made


def mlp() -> TensorDictModule:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    return TensorDictModule(net, ["observation"], ["logits"])


def observations(*batch: int) -> TensorDict:
    torch.manual_seed(1)
    return TensorDict({"observation": torch.randn(*batch, 4).double()}, list(batch))


def why(preset: str, **options: Any) -> LRP:
    composite = PRESETS[preset](-3.0, 3.0) if preset == "epsilon_gamma_box" else preset
    return LRP(composite, target=Target("logits", "argmax"), on_unmatched="raise", **options)


def kept(explained: Any, reason: str) -> float:
    return float(sum(entry.of(reason).sum() for entry in explained.ledger.entries))
