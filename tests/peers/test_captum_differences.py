"""Differences from a baseline are captum's, where captum shares all of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from tdhook import LRP, Target

captum = pytest.importorskip("captum.attr", reason="captum is not installed; `nox -s peers` installs it")
pytestmark = [
    pytest.mark.peers,
    pytest.mark.filterwarnings("ignore:Setting forward, backward hooks and attributes on non-linear"),
]


def relu_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(17, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 6))


def smooth_mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(17, 32),
        nn.Tanh(),
        nn.Linear(32, 32),
        nn.Sigmoid(),
        nn.Linear(32, 8),
        nn.Softplus(),
        nn.Linear(8, 6),
    )


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, 2),
        nn.LeakyReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(72, 6),
    )


def batch_normed() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ELU(), nn.AvgPool2d(7), nn.Flatten(), nn.Linear(32, 6)
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "ReLU": (relu_mlp, (17,)),
    "smooth": (smooth_mlp, (17,)),
    "cnn": (cnn, (3, 16, 16)),
    "batch norm": (batch_normed, (3, 16, 16)),
}
every_model = pytest.mark.parametrize("make, shape", MODELS.values(), ids=MODELS)


def ours(net: nn.Module, x: Tensor, baseline: object, **options: object) -> Tensor:
    method = LRP("deeplift", target=Target("output", 2), baseline=baseline, **options)
    with method.prepare(net) as run:
        found: Tensor = run(TensorDict({"input": x}, [len(x)]))["attr", "input"]
    return found


def theirs(method: object, x: Tensor, baseline: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of its hooks
        found: Tensor = method.attribute(x.clone().requires_grad_(), baseline, target=2)
    return found.detach()


@every_model
@pytest.mark.parametrize("flow", ["relevance", "gradient"])
@pytest.mark.parametrize("rows", [False, True])
def test_deep_lift(make, shape, flow, rows) -> None:
    torch.manual_seed(0)
    net, x = make().double().eval(), torch.randn(5, *shape).double()
    start = torch.randn(5 if rows else 1, *shape).double()
    wanted = theirs(captum.DeepLift(net), x, start)
    torch.testing.assert_close(ours(net, x, start, flow=flow), wanted, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("flow", ["relevance", "gradient"])
@pytest.mark.parametrize("activation", [nn.Tanh, nn.Softplus])
def test_max_pooling_where_the_same_values_win(activation, flow) -> None:
    """Where others win on the baseline, captum leaves it to one of the two, and this library to each in its turn.

    It loses some of the difference where an activation follows.
    """
    torch.manual_seed(0)
    layers = (nn.Conv2d(1, 4, 1), activation(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 6))
    net, x = nn.Sequential(*layers).double(), 3 * torch.rand(5, 1, 8, 8).double()
    start = 0.5 * x + 0.2
    wanted = theirs(captum.DeepLift(net), x, start)
    torch.testing.assert_close(ours(net, x, start, flow=flow), wanted, rtol=1e-6, atol=1e-9)


@every_model
def test_deep_lift_over_several_baselines(make, shape) -> None:
    """By captum, each row is explained against each of the baselines, which gives the mean."""
    torch.manual_seed(0)
    net, x, starts = make().double().eval(), torch.randn(3, *shape).double(), torch.randn(4, *shape).double()
    wanted = theirs(captum.DeepLiftShap(net), x, starts)
    found = torch.stack([ours(net, x, start) for start in starts]).mean(0)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-9)


def test_softmax_is_shared_whole() -> None:
    """In captum, what is left over is taken off each input; here the shares sum to the difference of the outputs."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(17, 16), nn.ReLU(), nn.Linear(16, 6), nn.Softmax(-1)).double()
    x, start = torch.randn(5, 17).double(), torch.zeros(1, 17).double()
    wanted = (net(x) - net(start)).detach()[:, 2]
    torch.testing.assert_close(ours(net, x, start).sum(1), wanted, rtol=1e-9, atol=1e-9)


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(17, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)))


def test_what_captum_does_not_see() -> None:
    """A function in place of a module takes the derivative there, and the sum is another one."""
    torch.manual_seed(0)
    net, x, start = Functional().double(), torch.randn(5, 17).double(), torch.randn(1, 17).double()
    wanted = (net(x) - net(start)).detach()[:, 2]
    torch.testing.assert_close(ours(net, x, start).sum(1), wanted, rtol=1e-9, atol=1e-9)
    assert (theirs(captum.DeepLift(net), x, start).sum(1) - wanted).abs().max() > 0.1 * wanted.abs().max()
