"""Integrated gradients: complete, exact where the way is a polynomial, and chosen once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict
from torch import Tensor, nn

from tdhook import Target
from tdhook.attribution import GradientTimesInput, IntegratedGradients
from tdhook.perturbing.quadrature import gauss_legendre, quadrature
from tdhook.perturbing.references import as_references


class Cubic(nn.Module):
    """``x0^3 + 2 x0 x1 + x2``, whose integrated gradients are known."""

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = x.unbind(-1)
        return (a**3 + 2 * a * b + c).unsqueeze(-1)


def test_a_polynomial_is_integrated_exactly() -> None:
    x = torch.randn(7, 3).double()
    found = IntegratedGradients(steps=2).wrap(Cubic())(TensorDict({"input": x}, [7]))["attr", "input"]
    a, b, c = x.unbind(-1)
    torch.testing.assert_close(found, torch.stack([a**3 + a * b, a * b, c], -1), rtol=1e-12, atol=1e-12)


@given(st.integers(1, 40))
def test_nodes_and_weights(count: int) -> None:
    places, weights = map(torch.tensor, zip(*gauss_legendre(count), strict=True))
    degree = min(2 * count - 1, 9)
    torch.testing.assert_close(
        (weights.double() * places.double() ** degree).sum(),
        torch.tensor(1 / (degree + 1)).double(),
        rtol=1e-6,
        atol=0,
    )


@pytest.mark.parametrize(
    "name, places, weights",
    [
        ("left", [0, 1 / 4, 2 / 4, 3 / 4], [1 / 4] * 4),
        ("middle", [1 / 8, 3 / 8, 5 / 8, 7 / 8], [1 / 4] * 4),
        ("right", [1 / 4, 2 / 4, 3 / 4, 1], [1 / 4] * 4),
        ("trapezoid", [0, 1 / 3, 2 / 3, 1], [1 / 6, 1 / 3, 1 / 3, 1 / 6]),
    ],
)
def test_rules_of_quadrature(name: str, places: list[float], weights: list[float]) -> None:
    found = quadrature(name, 4)
    assert [place for place, _ in found] == pytest.approx(places)
    assert [weight for _, weight in found] == pytest.approx(weights)


def smooth() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 16), nn.Softplus(), nn.Linear(16, 3)
    ).double()


@pytest.mark.parametrize(
    "baseline",
    [0.0, torch.tensor([0.5, -1.0, 0.0, 2.0]).double(), "mean", "sample", torch.zeros_like, {"input": 0.3}],
    ids=["number", "tensor", "mean", "sample", "function", "mapping"],
)
def test_completeness(baseline) -> None:
    net, x = smooth(), torch.randn(6, 4).double()
    method = IntegratedGradients(Target("output", 1), baseline=baseline, steps=24)
    found = method.wrap(net)(TensorDict({"input": x}, [6]))["attr", "input"]
    drawn = as_references(baseline, 1).of({"input": x}, {"input": 1}, TensorDict({"input": x}, [6]))
    begin = drawn[0].replaced["input"]
    torch.testing.assert_close(found.sum(-1), (net(x) - net(begin))[:, 1], rtol=1e-9, atol=1e-9)


def test_what_is_chosen_is_chosen_at_the_input() -> None:
    """On the way from the baseline another output is the largest."""
    net = nn.Linear(1, 2, bias=True).double()
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[2.0], [0.0]]))
        net.bias.copy_(torch.tensor([-1.0, 0.0]))
    td = TensorDict({"input": torch.ones(1, 1).double()}, [1])
    found = IntegratedGradients(Target("output", "argmax")).wrap(net)(td)["attr", "input"]
    torch.testing.assert_close(found, torch.full((1, 1), 2.0).double())


def test_integers_are_explained_at_their_embedding() -> None:
    net = nn.Sequential(
        nn.Embedding(10, 4), nn.Flatten(), nn.Linear(12, 6), nn.Tanh(), nn.Linear(6, 2)
    ).double()
    td = TensorDict({"input": torch.randint(10, (5, 3))}, [5])
    method = IntegratedGradients(Target("output", 0), use_inputs=False, input_modules=["0"], steps=32)
    found = method.wrap(net)(td)["attr", "0"]
    start = net[1:](torch.zeros(5, 3, 4).double())
    torch.testing.assert_close(found.sum((1, 2)), (net(td["input"]) - start)[:, 0], rtol=1e-8, atol=1e-8)


def test_a_linear_model_needs_one_step() -> None:
    net, td = nn.Linear(4, 2).double(), TensorDict({"input": torch.randn(3, 4).double()}, [3])
    target = Target("output", 1)
    one = IntegratedGradients(target, steps=1).wrap(net)(td.clone())["attr", "input"]
    torch.testing.assert_close(one, GradientTimesInput(target).wrap(net)(td.clone())["attr", "input"])


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="at least one gradient is averaged, got steps=0"):
        IntegratedGradients(steps=0)
    td = TensorDict({"input": torch.randn(3, 4).double()}, [3])
    with pytest.raises(
        KeyError, match="baseline 'median' is neither 'mean', 'sample', 'previous' nor an entry"
    ):
        IntegratedGradients(Target("output", 0), baseline="median").wrap(smooth())(td)
    with pytest.raises(ValueError, match=r"the baseline of 'input' has shape \[5\], which does not fit"):
        IntegratedGradients(Target("output", 0), baseline=torch.zeros(5)).wrap(smooth())(td)


class Branches(nn.Module):
    """A layer behind the input, and two beside each other behind that."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).tanh()
        return self.a(hidden).tanh() * self.b(hidden).sigmoid()


def test_values_that_depend_on_each_other_go_ways_of_their_own() -> None:
    """Each of the input, the layer and the two beside each other is complete by itself."""
    net, td = Branches().double(), TensorDict({"input": torch.randn(5, 3).double()}, [5])
    method = IntegratedGradients(Target("output", 0), input_modules=["first", "a", "b"], steps=24)
    found = method.wrap(net)(td.clone())
    value, hidden = net(td["input"])[:, 0], torch.zeros(5, 4).double()
    at_zero = net(torch.zeros(5, 3).double())[:, 0]
    torch.testing.assert_close(found["attr", "input"].sum(-1), value - at_zero, rtol=1e-8, atol=1e-8)
    of_layer = (net.a(hidden).tanh() * net.b(hidden).sigmoid())[:, 0]
    torch.testing.assert_close(found["attr", "first"].sum(-1), value - of_layer, rtol=1e-8, atol=1e-8)
    both = found["attr", "a"].sum(-1) + found["attr", "b"].sum(-1)
    torch.testing.assert_close(both, value, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("baseline", ["mean", lambda x: x.mean(0, keepdim=True)], ids=["mean", "function"])
def test_the_data_of_a_baseline_are_all_elements_of_the_batch(baseline) -> None:
    net, x = smooth(), torch.randn(2, 3, 4).double()
    method = IntegratedGradients(Target("output", 1), baseline=baseline, steps=8)
    found = method.wrap(net)(TensorDict({"input": x}, [2, 3]))["attr", "input"]
    flat = method.wrap(net)(TensorDict({"input": x.reshape(6, 4)}, [6]))["attr", "input"]
    torch.testing.assert_close(found.reshape(6, 4), flat)


def test_an_element_is_not_compared_with_itself() -> None:
    td = TensorDict({"input": torch.randn(4).double()}, [])
    with pytest.raises(ValueError, match="the mean or a sample of the batch is 'input' itself"):
        IntegratedGradients(Target("output", 1), baseline="mean").wrap(smooth())(td)
