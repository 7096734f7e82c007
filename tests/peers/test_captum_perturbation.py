"""Methods that replace features give captum's numbers: a feature's value there is ours, summed over its entries."""

from __future__ import annotations

import math

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from tdhook import Target
from tdhook.attribution import Ablation, KernelShap, Occlusion, Shapley, ShapleySampling
from tdhook.perturbing.features import patches

captum = pytest.importorskip("captum.attr", reason="captum is not installed; `nox -s peers` installs it")
pytestmark = pytest.mark.peers


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(7, 32), nn.Tanh(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 6)).double()


def cnn() -> nn.Module:
    convolutions = (nn.Conv2d(4, 8, 8, 4), nn.SiLU(), nn.Conv2d(8, 8, 4, 2), nn.SiLU())
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(8 * 9 * 9, 6)).double()


def assert_close(ours: Tensor, theirs: Tensor, summands: int = 1) -> None:
    """Equal, but that captum sums Shapley values in single precision."""
    atol = 1e-9 if theirs.dtype is torch.float64 else 1e-7 * summands**0.5
    torch.testing.assert_close(ours.to(theirs), theirs, rtol=1e-6, atol=atol)


@pytest.mark.parametrize("strides", [(12, 12), (9, 6)])
def test_occlusion(strides) -> None:
    net, x = cnn(), torch.randn(2, 4, 84, 84).double()
    td = TensorDict({"input": x}, [2])
    baseline = torch.randn(4, 84, 84).double()
    ours = Occlusion(Target("output", 2), window=(12, 12), strides=strides, baseline=baseline).wrap(net)(td)
    theirs = captum.Occlusion(net).attribute(
        x, (4, 12, 12), (4, *strides), baselines=baseline.unsqueeze(0), target=2
    )
    assert_close(ours["attr", "input"] * (4 * 12 * 12), theirs)


@pytest.mark.parametrize("groups", [None, torch.tensor([0, 0, 1, 2, 2, 2, 1])])
def test_ablation_and_shapley_values(groups) -> None:
    net, x = mlp(), torch.randn(3, 7).double()
    td, baseline = TensorDict({"input": x}, [3]), torch.randn(7).double()
    extent = 1 if groups is None else groups.bincount()[groups]
    mask = None if groups is None else groups.unsqueeze(0)
    given = {"baselines": baseline.unsqueeze(0), "feature_mask": mask, "target": 1}
    pairs = {
        Ablation: captum.FeatureAblation(net).attribute(x, **given),
        Shapley: captum.ShapleyValues(net).attribute(x, **given),
        KernelShap: captum.ShapleyValues(net).attribute(x, **given),
    }
    for method, theirs in pairs.items():
        ours = method(Target("output", 1), baseline=baseline, features=groups).wrap(net)(td.clone())
        assert_close(ours["attr", "input"] * extent, theirs, math.factorial(7))


def test_patches_of_pictures() -> None:
    net, x = cnn(), torch.randn(2, 4, 84, 84).double()
    td, groups = TensorDict({"input": x}, [2]), patches((4, 84, 84), 28).contiguous()
    ours = Ablation(Target("output", 3), features=groups).wrap(net)(td)["attr", "input"]
    theirs = captum.FeatureAblation(net).attribute(x, feature_mask=groups.unsqueeze(0), target=3)
    assert_close(ours * (4 * 28 * 28), theirs)


def test_sampled_shapley_values_of_all_orders() -> None:
    """Both come near the exact ones; on two features, pairs of orders are all orders."""
    net, x = mlp(), torch.randn(3, 7).double()
    td, groups = TensorDict({"input": x}, [3]), torch.tensor([0, 0, 1, 1, 0, 1, 0])
    ours = ShapleySampling(Target("output", 1), features=groups, permutations=2).wrap(net)(td)
    theirs = captum.ShapleyValues(net).attribute(x, feature_mask=groups.unsqueeze(0), target=1)
    assert_close(ours["attr", "input"] * groups.bincount()[groups], theirs)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(3, 8), nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.out(torch.tanh(self.a(a)) * torch.sigmoid(self.b(b)))


def test_two_inputs() -> None:
    net = TwoInputs().double()
    a, b = torch.randn(3, 3).double(), torch.randn(3, 4).double()
    module, td = TensorDictModule(net, ["a", "b"], ["output"]), TensorDict({"a": a, "b": b}, [3])
    for method, other in ((Ablation, captum.FeatureAblation), (Shapley, captum.ShapleyValues)):
        ours = method(Target("output", 1), baseline={"a": 0.5, "b": -1.0}).wrap(module)(td.clone())
        theirs = other(net).attribute((a, b), baselines=(0.5, -1.0), target=1)
        assert_close(ours["attr", "a"], theirs[0], math.factorial(7))
        assert_close(ours["attr", "b"], theirs[1], math.factorial(7))


def test_a_layer() -> None:
    net, x = mlp(), torch.randn(3, 7).double()
    ours = Ablation(Target("output", 1), use_inputs=False, input_modules=["1"]).wrap(net)(
        TensorDict({"input": x}, [3])
    )
    hidden = net[:2](x)
    theirs = captum.FeatureAblation(net[2:]).attribute(hidden, target=1)
    assert_close(ours["attr", "1"], theirs.detach())
