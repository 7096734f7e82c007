"""The models that are timed, and the floor that they are timed against."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictModuleBase
from torch import nn

from tdhook import LRP, Target


@dataclass(frozen=True)
class Case:
    name: str
    preset: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    batch: int

    def model(self) -> TensorDictModule:
        torch.manual_seed(0)
        module = self.make().eval().requires_grad_(False)
        return TensorDictModule(module, in_keys=["observation"], out_keys=["action_value"])

    def data(self) -> TensorDict:
        torch.manual_seed(1)
        return TensorDict({"observation": torch.rand(self.batch, *self.shape)}, batch_size=[self.batch])


def mlp() -> nn.Module:
    sizes = (17, 256, 256, 6)
    layers: list[nn.Module] = []
    for width_in, width_out in itertools.pairwise(sizes):
        layers += [nn.Linear(width_in, width_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def nature_cnn() -> nn.Module:
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
        nn.Linear(512, 6),
    )


CASES = [
    *(Case(f"MLP 17-256-256-6, batch {b}", "epsilon_plus", mlp, (17,), b) for b in (1, 256, 4096)),
    *(Case(f"Nature CNN, batch {b}", "epsilon_plus", nature_cnn, (4, 84, 84), b) for b in (1, 32)),
    Case("Nature CNN, batch 32", "epsilon_alpha2_beta1", nature_cnn, (4, 84, 84), 32),
]


def floor(model: TensorDictModuleBase) -> Callable[[TensorDict], TensorDict]:
    """Gradient times input of the same target: one forward and one backward pass, TensorDict in and out."""

    def explain(td: TensorDict) -> TensorDict:
        x = td["observation"].detach().requires_grad_()
        with torch.enable_grad():
            q = model(TensorDict({"observation": x}, td.batch_size))["action_value"]
            (grad,) = torch.autograd.grad(q.amax(-1).sum(), x)
        td.set(("attr", "observation"), (x * grad).detach())
        return td.set("action_value", q.detach())

    return explain


def explained(case: Case, model: TensorDictModuleBase) -> Callable[[TensorDict], TensorDict]:
    return LRP(case.preset, target=Target("action_value", "argmax")).wrap(model)
