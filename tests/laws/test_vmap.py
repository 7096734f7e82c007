"""Rules inside `torch.vmap`: over samples, and over the parameters of an ensemble."""

import pytest
import torch
from tensordict import from_module
from torch import nn

from tdhook.rules import (
    AlphaBetaRule,
    EpsilonRule,
    FlatRule,
    GammaRule,
    PassRule,
    PropagationRule,
    StopRule,
    WSquareRule,
    ZBoxRule,
    ZPlusRule,
)

RULES = [
    EpsilonRule(),
    AlphaBetaRule(),
    ZPlusRule(),
    GammaRule(),
    FlatRule(),
    WSquareRule(),
    ZBoxRule(-3.0, 3.0),
]
DENSE = (nn.Linear(3, 4).double(), (5, 3))
CONV = (nn.Conv2d(1, 2, 3).double(), (5, 1, 6, 6))


def relevance(function, x):
    z = function(x)
    return torch.autograd.grad(z, x, z.detach())[0]


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("layer, shape", [DENSE, CONV], ids=["dense", "convolution"])
def test_over_samples(rule, layer, shape):
    x = torch.randn(*shape).double().requires_grad_()
    with rule.register(layer):
        torch.testing.assert_close(
            relevance(torch.vmap(layer), x), relevance(layer, x), rtol=1e-9, atol=1e-12
        )


@pytest.mark.parametrize("rule", [PassRule(), StopRule()], ids=repr)
def test_activations_over_samples(rule):
    x, layer = torch.randn(5, 3).double().requires_grad_(), nn.Tanh()
    with rule.register(layer):
        torch.testing.assert_close(relevance(torch.vmap(layer), x), relevance(layer, x))


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_over_the_parameters_of_an_ensemble(rule):
    members = [nn.Linear(3, 4).double() for _ in range(3)]
    params = torch.stack([from_module(member) for member in members])
    shell, x = nn.Linear(3, 4).double(), torch.randn(5, 3).double().requires_grad_()

    def call(member, value):
        with member.to_module(shell):
            return shell(value)

    with rule.register(shell):
        got = relevance(lambda value: torch.vmap(call, (0, None))(params, value), x)
    expected = torch.zeros_like(x)
    for member in members:
        with rule.register(member):
            expected += relevance(member, x)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


class Cubed(nn.Module):
    def forward(self, x):
        return x**3


def test_a_layer_without_closed_form():
    x = torch.randn(5, 3).requires_grad_()
    layer = Cubed()
    with EpsilonRule(1e-9).register(layer):
        torch.vmap(layer)(x).sum().backward()
    torch.testing.assert_close(x.grad, 3 * torch.ones_like(x))  # R_i = x_i 3 x_i^2 / x_i^3


def test_a_formula_that_asks_for_the_product_of_a_layer_without_closed_form():
    class Asks(PropagationRule):
        needs_vjp = True

        def propagate(self, step, relevance):
            return step.vjp(*relevance)

    x, layer = torch.randn(5, 3).requires_grad_(), Cubed()
    with (
        Asks().register(layer),
        pytest.raises(NotImplementedError, match="Cubed, which cannot be done inside"),
    ):
        torch.vmap(layer)(x)
