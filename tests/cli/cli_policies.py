"""Policies that the tests of the command line name by import path, good ones and others."""

from __future__ import annotations

import torch
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import Tensor, nn

from tdhook.rl import Policy


class Pick(nn.Module):
    def forward(self, logits: Tensor) -> Tensor:
        return nn.functional.one_hot(logits.argmax(-1), logits.shape[-1])


def sequence(features: int, actions: int) -> TensorDictSequential:
    return TensorDictSequential(
        TensorDictModule(nn.Sequential(nn.Linear(features, 8), nn.ReLU()), ["observation"], ["hidden"]),
        TensorDictModule(nn.Linear(8, actions), ["hidden"], ["scores"]),
        TensorDictModule(Pick(), ["scores"], ["action"]),
    )


def cartpole() -> TensorDictSequential:
    return sequence(4, 2)


class Unusual(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.polygamma(1, x.abs() + 1)


def unusual() -> TensorDictSequential:
    policy = sequence(4, 2)
    policy[0].module.insert(0, Unusual())
    return policy


def named() -> Policy:
    return Policy(sequence(4, 2), "CartPole-v1", ("w", "x", "y", "z"), ("go west", "go east"))


def one_way() -> Policy:
    actor = sequence(4, 2)
    actor[1].module.bias.data = torch.tensor([0.0, 100.0])
    return Policy(actor, "CartPole-v1", (), ())


def acrobot() -> TensorDictSequential:
    return sequence(6, 3)


def continuous() -> TensorDictModule:
    return TensorDictModule(nn.Sequential(nn.Linear(3, 1), nn.Tanh()), ["observation"], ["action"])


def reads_pixels() -> TensorDictModule:
    return TensorDictModule(nn.Linear(4, 2), ["pixels"], ["action"])


def never_acts() -> TensorDictModule:
    return TensorDictModule(nn.Linear(4, 2), ["observation"], ["scores"])


def acts_otherwise() -> TensorDictSequential:
    return sequence(4, 3)


def plain() -> nn.Module:
    return nn.Linear(4, 2)


def broken() -> None:
    raise RuntimeError("no weights")


number = 3
