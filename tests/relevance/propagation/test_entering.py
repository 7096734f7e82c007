"""Layers that make their weights in their forward: rules that modify weights get them where they reach an operation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from tdhook import LRP, Target
from tdhook.rules import AlphaBetaRule, EpsilonRule, FlatRule, GammaRule, WSquareRule, ZBoxRule, ZPlusRule
from tdhook.selectors import Name

RULES = [
    ZPlusRule(),
    AlphaBetaRule(),
    GammaRule(),
    WSquareRule(),
    FlatRule(),
    ZBoxRule(-4.0, 4.0),
    EpsilonRule(1e-3),
    EpsilonRule(1e-3, zero_params="bias"),
]
IMAGES = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0)).double()
ROWS = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).double()


def standardised(weight: Tensor) -> Tensor:
    centred = weight - weight.mean((1, 2, 3), keepdim=True)
    return centred / weight.std((1, 2, 3), keepdim=True)


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, standardised(self.weight), self.bias, self.stride, self.padding)


class Directed(nn.Module):
    """A weight-decomposed low-rank adapter: a direction, and a magnitude for each output."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(4, 5)), nn.Parameter(torch.randn(4))
        self.down, self.up = nn.Parameter(torch.randn(2, 5)), nn.Parameter(torch.randn(4, 2))
        self.magnitude = nn.Parameter(torch.rand(4) + 0.5)

    def effective(self) -> Tensor:
        moved = self.weight + self.up @ self.down
        return self.magnitude.unsqueeze(-1) * moved / moved.norm(dim=-1, keepdim=True)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.effective(), self.bias)


class Transposed(nn.Module):
    """A linear layer in the manner of GPT-2, its weight the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(5, 4)), nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


def dense(weight: Tensor, bias: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0]).double()
    layer.weight.data, layer.bias.data = weight.detach().clone(), bias.detach().clone()
    return layer


def case(name: str) -> tuple[nn.Module, nn.Module, Tensor]:
    """A layer that makes its weights, the same with fixed ones, and its input."""
    torch.manual_seed(0)
    if name == "standardised":
        layer, plain = Standardised(3, 4, 3, padding=1).double(), nn.Conv2d(3, 4, 3, padding=1).double()
        plain.weight.data, plain.bias.data = standardised(layer.weight.detach()), layer.bias.detach()
        return layer, plain, IMAGES
    if name == "transposed":
        layer = Transposed().double()
        return layer, dense(layer.weight.T, layer.bias), ROWS
    if name == "directed":
        layer = Directed().double()
        return layer, dense(layer.effective(), layer.bias), ROWS
    layer = getattr(parametrizations, name)(nn.Linear(5, 4).double()).eval()
    return layer, dense(layer.weight, layer.bias), ROWS


NAMES = ["standardised", "transposed", "directed", "weight_norm", "spectral_norm", "orthogonal"]


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("name", NAMES)
def test_rules_look_at_the_weights_that_are_used(name: str, rule) -> None:
    layer, plain, x = case(name)
    relevance = []
    for module in (layer, plain):
        body = nn.Sequential(module, nn.ReLU(), nn.Flatten())
        torch.manual_seed(1)
        head = nn.Linear(body(x).shape[-1], 2).double()
        relevance.append(_explained(nn.Sequential(*body, head), rule, x))
    torch.testing.assert_close(*relevance, rtol=1e-9, atol=1e-12)


def _explained(model: nn.Sequential, rule, x: Tensor) -> Tensor:
    lrp = LRP([(Name("0"), rule), (nn.Linear, EpsilonRule())], target=Target("output", 0), ledger=True)
    td = lrp.wrap(model)(TensorDict({"input": x}, [len(x)]))
    assert td["ledger", "gap"].abs().max() < 1e-9
    torch.testing.assert_close(td["output"], model(x).detach(), rtol=1e-12, atol=1e-12)
    return td["attr", "input"]


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("name", NAMES)
def test_rules_that_are_registered_do_so_too(name: str, rule) -> None:
    layer, plain, x = case(name)
    relevance = []
    for module in (layer, plain):
        leaf = x.clone().requires_grad_()
        with rule.register(module):
            z = module(leaf)
            relevance.append(torch.autograd.grad(z, leaf, z.detach())[0])
    torch.testing.assert_close(*relevance, rtol=1e-9, atol=1e-12)


def test_a_weight_is_made_as_often_as_the_model_makes_it() -> None:
    made = []

    class Counts(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            made.append(1)
            return 2 * weight

    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    parametrize.register_parametrization(model[0], "weight", Counts())
    made.clear()
    for preset in ("epsilon_plus", "epsilon_alpha2_beta1", "attn_lrp"):
        explained = LRP(preset, target=Target("output", 0)).wrap(model)
        made.clear()
        explained(TensorDict({"input": ROWS}, [3]))
        assert len(made) == 1, preset


def test_weights_that_are_cached() -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(5, 4)), nn.ReLU(), nn.Linear(4, 2)).double()
    plain = nn.Sequential(dense(model[0].weight, model[0].bias), nn.ReLU(), model[2])
    lrp = LRP([(nn.Linear, ZPlusRule())], target=Target("output", 0))
    with parametrize.cached():
        model(ROWS)
        found = lrp.wrap(model)(TensorDict({"input": ROWS}, [3]))
    wanted = lrp.wrap(plain)(TensorDict({"input": ROWS}, [3]))
    torch.testing.assert_close(found["attr", "input"], wanted["attr", "input"], rtol=1e-9, atol=1e-12)


class Multiplies(nn.Module):
    """Holds a matrix, and performs no linear operation with it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 5).double())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def test_where_there_is_no_operation_it_is_said() -> None:
    message = "Multiplies performs no linear operation with weights; give Multiplies another rule"
    model = Multiplies()
    explained = LRP([(Multiplies, ZPlusRule())], target=Target("output", 0)).wrap(model)
    with pytest.raises(NotImplementedError, match=message):
        explained(TensorDict({"input": ROWS}, [3]))
    with ZPlusRule().register(model), pytest.raises(NotImplementedError, match=message):
        model(ROWS.clone().requires_grad_())
    assert "forward" not in vars(model)
