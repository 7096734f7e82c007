"""Normalisation whose deviation is held constant in part, or is written by hand."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from tdhook import LRP, Composite, Target, preset
from tdhook.rules import EpsilonRule, IgnoreRule, LayerNormRule
from tdhook.selectors import Last, Op, Type

from .checks import registered_relevance

EXACT = {"rtol": 1e-9, "atol": 1e-9}


class HandMade(nn.Module):
    """RMS normalisation as transformers write it, with a weight, or one more than that."""

    def __init__(self, size: int, more: float = 0.0) -> None:
        super().__init__()
        self.weight, self.eps, self.more = nn.Parameter(torch.randn(size)), 1e-6, more

    def forward(self, x: Tensor) -> Tensor:
        return (self.more + self.weight) * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


class HandMadeRMSNorm(HandMade):
    """By a name that tells what it is."""


def norms() -> list[nn.Module]:
    torch.manual_seed(0)
    found = [
        nn.LayerNorm(5),
        nn.RMSNorm(5, eps=1e-5),
        nn.LayerNorm((3, 5), eps=0.1),
        nn.LayerNorm(5, bias=False),
    ]
    for module in found:
        nn.init.normal_(module.weight)
    return [*(module.double() for module in found), HandMadeRMSNorm(5).double()]


@pytest.mark.parametrize("index", range(5))
@pytest.mark.parametrize("held", [0.0, 0.25, 0.5, 1.0])
def test_what_is_not_held_follows_the_gradient(index: int, held: float) -> None:
    module = norms()[index]
    torch.manual_seed(1)
    x, g = torch.randn(2, 4, 3, 5).double()
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(module(x), x, g)
    x = x.detach()
    (constant,) = registered_relevance(LayerNormRule(), module, [x], g)
    (actual,) = registered_relevance(LayerNormRule(held), module, [x], g)
    torch.testing.assert_close(actual, held * constant + (1 - held) * gradient, **EXACT)


@pytest.mark.parametrize("flow", ["gradient", "relevance"])
def test_what_is_not_held_is_absorbed(flow: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3)).double()
    composite = Composite([(nn.LayerNorm, LayerNormRule(0.25)), (nn.Linear, EpsilonRule(0.0))])
    with LRP(composite, target=Target("output", 1), flow=flow, ledger=True).prepare(model) as explained:
        td = explained(TensorDict({"input": torch.randn(6, 4).double()}, [6]))
        constant = sum(entry.of("constant").abs().sum() for entry in explained.ledger.entries)
    assert (td["ledger", "gap"].abs() < 1e-9).all() and constant > 0


def test_against_a_reference_the_rest_goes_by_its_secant() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3)).double()
    td = TensorDict({"input": torch.randn(6, 4).double()}, [6])

    def shares(held: float) -> Tensor:
        composite = Composite([(nn.LayerNorm, LayerNormRule(held)), (nn.Linear, EpsilonRule(0.0))])
        lrp = LRP(composite, target=Target("output", 1), baseline=0.5)
        return lrp.wrap(model)(td.clone())["attr", "input"]

    torch.testing.assert_close(shares(0.25), 0.25 * shares(1.0) + 0.75 * shares(0.0), **EXACT)
    rise = model(td["input"])[:, 1] - model(torch.full_like(td["input"], 0.5))[:, 1]
    torch.testing.assert_close(shares(0.0).sum(-1), rise.detach(), **EXACT)


def test_a_part_is_a_number_from_none_to_all() -> None:
    for held in (-0.1, 1.1):
        with pytest.raises(ValueError, match=f"a part of the deviation, a number from 0 to 1, got {held}"):
            LayerNormRule(held)
    composite = Composite([(nn.LayerNorm, LayerNormRule(0.5))])
    assert Composite.from_dict(composite.to_dict()) == composite
    assert LayerNormRule() != LayerNormRule(0.5)


def test_a_norm_that_computes_something_else_is_refused() -> None:
    torch.manual_seed(0)
    td = TensorDict({"input": torch.randn(3, 5).double()}, [3])
    for more in (0.0, 1.0):
        model = nn.Sequential(nn.Linear(5, 5), HandMadeRMSNorm(5, more), nn.Linear(5, 2)).double()
        explained = LRP([(Type("*RMSNorm"), LayerNormRule())], target=Target("output", 0)).wrap(model)
        if more:
            with pytest.raises(
                ValueError, match=r"takes HandMadeRMSNorm to return .* leave it to its operations"
            ):
                explained(td.clone())
        else:
            explained(td.clone())


def test_relp_holds_a_part_of_the_last_normalisation_and_all_of_the_others() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 5), nn.LayerNorm(5), nn.GELU(), nn.Linear(5, 5), nn.LayerNorm(5), nn.Linear(5, 3)
    ).double()
    td, target = TensorDict({"input": torch.randn(6, 4).double()}, [6]), Target("output", 1)

    def found(composite: object) -> Tensor:
        return LRP(composite, target=target, flow="gradient").wrap(model)(td.clone())["attr", "input"]

    last = Last(Type(nn.LayerNorm))
    free = [(nn.GELU, IgnoreRule()), (Op("gelu"), IgnoreRule())]
    followed = Composite([(Op("layer_norm") & last, IgnoreRule()), *free]) + preset("cp_lrp")
    held = Composite(free) + preset("cp_lrp")
    torch.testing.assert_close(found("relp"), 0.4 * found(held) + 0.6 * found(followed), **EXACT)
    torch.testing.assert_close(found(preset("relp", held=1.0)), found(held), **EXACT)


@pytest.mark.parametrize("model", [lambda x: nn.functional.gelu(x), nn.GELU()], ids=["function", "module"])
def test_relp_leaves_activations_to_their_gradient(model) -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return model(x)

    x = torch.linspace(-2, 2, 9).double().reshape(3, 3).requires_grad_()
    (gradient,) = torch.autograd.grad(model(x)[:, 0].sum(), x)
    td = TensorDict({"input": x.detach()}, [3])
    found = LRP("relp", target=Target("output", 0), flow="gradient").wrap(Net())(td)["attr", "input"]
    torch.testing.assert_close(found, (x * gradient).detach(), **EXACT)
