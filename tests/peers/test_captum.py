"""Gradient methods give captum's numbers."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from tdhook import Target
from tdhook.attribution import Gradient, GradientTimesInput, IntegratedGradients

captum = pytest.importorskip("captum.attr", reason="captum is not installed; `nox -s peers` installs it")
pytestmark = pytest.mark.peers


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(17, 64), nn.Tanh(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 6))


def cnn() -> nn.Module:
    convolutions = (nn.Conv2d(4, 8, 8, 4), nn.SiLU(), nn.Conv2d(8, 8, 4, 2), nn.SiLU())
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(8 * 9 * 9, 6))


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(3, 8), nn.Linear(5, 8), nn.Linear(8, 4)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.out(torch.tanh(self.a(a)) * torch.sigmoid(self.b(b)))


MODELS = {"mlp": (mlp, (17,)), "cnn": (cnn, (4, 84, 84))}
every_model = pytest.mark.parametrize("make, shape", MODELS.values(), ids=MODELS)


@every_model
def test_one_input(make, shape) -> None:
    net, x = make().double(), torch.randn(5, *shape).double()
    td, index = TensorDict({"input": x}, [5]), Target("output", 2)
    baseline = torch.randn(shape).double()
    leaf = x.clone().requires_grad_()  # captum warns where it has to make one
    pairs = {
        "saliency": (Gradient(index), captum.Saliency(net).attribute(leaf, target=2)),
        "gradient x input": (GradientTimesInput(index), captum.InputXGradient(net).attribute(leaf, target=2)),
        "integrated gradients": (
            IntegratedGradients(index, baseline=baseline, steps=20),
            captum.IntegratedGradients(net).attribute(x, baseline.expand_as(x), target=2, n_steps=20),
        ),
    }
    for name, (method, theirs) in pairs.items():
        ours = method.wrap(net)(td.clone())["attr", "input"]
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-6, atol=1e-8, msg=name)


def test_two_inputs_with_baselines_of_their_own() -> None:
    net = TwoInputs().double()
    a, b = torch.randn(5, 3).double(), torch.randn(5, 5).double()
    theirs = captum.IntegratedGradients(net).attribute((a, b), (0.5, -1.0), target=1, n_steps=16)
    method = IntegratedGradients(Target("output", 1), baseline={"a": 0.5, ("deep", "b"): -1.0}, steps=16)
    td = TensorDict({"a": a, ("deep", "b"): b}, [5])
    found = method.wrap(net, in_keys=["a", ("deep", "b")])(td)
    torch.testing.assert_close(found["attr", "a"], theirs[0].detach(), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(found["attr", "deep", "b"], theirs[1].detach(), rtol=1e-6, atol=1e-8)


def test_tokens_at_their_embedding() -> None:
    net = nn.Sequential(
        nn.Embedding(20, 6), nn.Flatten(), nn.Linear(24, 8), nn.Tanh(), nn.Linear(8, 3)
    ).double()
    tokens = torch.randint(20, (5, 4))
    layered = captum.LayerIntegratedGradients(net, net[0])
    # captum's baseline is the tokens'; that of the embedding's values is its row of zeros
    with torch.no_grad():
        net[0].weight[0].zero_()
    theirs = layered.attribute(tokens, torch.zeros_like(tokens), target=1, n_steps=20)
    method = IntegratedGradients(Target("output", 1), use_inputs=False, input_modules=["0"], steps=20)
    found = method.wrap(net)(TensorDict({"input": tokens}, [5]))
    torch.testing.assert_close(found["attr", "0"], theirs.detach(), rtol=1e-6, atol=1e-8)
