"""What rules compute cheaply is what their definitions say, contribution by contribution."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tdhook.relevance.propagation.call import Call
from tdhook.relevance.rules import definitions
from tdhook.rules import AlphaBetaRule, EpsilonRule, GammaRule, NormRule, UniformEpsilonRule, ZPlusRule

RULES = {
    "epsilon": (EpsilonRule(0.01), lambda *args: definitions.epsilon(*args, 0.01)),
    "epsilon, no bias": (
        EpsilonRule(0.01, zero_params="bias"),
        lambda x, w, b, r: definitions.epsilon(x, w, 0 * b, r, 0.01),
    ),
    "z-plus": (ZPlusRule(0.01), lambda *args: definitions.alpha_beta(*args, 0.01, alpha=1.0, beta=0.0)),
    "alpha-beta": (
        AlphaBetaRule(3.0, 2.0, 0.01),
        lambda *args: definitions.alpha_beta(*args, 0.01, alpha=3.0, beta=2.0),
    ),
    "gamma": (GammaRule(0.7, 0.01), lambda *args: definitions.gamma(*args, 0.01, gamma=0.7)),
}
LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), (6,)),
    "without bias": (lambda: nn.Linear(6, 5, bias=False), (6,)),
    "conv2d": (lambda: nn.Conv2d(2, 3, 2, stride=2, padding=1), (2, 4, 3)),
    "grouped": (lambda: nn.Conv1d(4, 6, 2, groups=2), (4, 5)),
    "transposed": (lambda: nn.ConvTranspose1d(2, 3, 2, stride=2), (2, 4)),
    "differentiated": (lambda: nn.Sequential(nn.Linear(6, 5)), (6,)),
}


@pytest.mark.parametrize("sign", ["signed", "non-negative"])
@pytest.mark.parametrize("make, shape", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("rule, definition", RULES.values(), ids=RULES)
def test_a_rule_is_its_definition(rule, definition, make, shape, sign):
    torch.manual_seed(0)
    layer = make().double()
    x = torch.randn(3, *shape, dtype=torch.double)
    x = x.relu() if sign == "non-negative" else x
    bias = layer(torch.zeros(1, *shape).double()).flatten()
    weight = torch.autograd.functional.jacobian(lambda x: layer(x).flatten(), torch.zeros(1, *shape).double())
    weight, bias = weight.reshape(len(bias), -1), bias.detach()
    with rule.register(layer):
        x.requires_grad_()
        z = layer(x)
        relevance = torch.randn_like(z)
        (got,) = torch.autograd.grad(z, x, relevance)
    expected = definition(x.detach().flatten(1), weight, bias, relevance.flatten(1))
    torch.testing.assert_close(got.flatten(1), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("flow", ["relevance", "gradient"])
def test_a_shortcut_gives_what_the_formula_gives(flow):
    """Epsilon runs natively between its two factors what has no closed form, and everything in the gradient flow."""
    rule, layer = EpsilonRule(0.1), nn.Sequential(nn.Linear(6, 5), nn.Tanh()).double()
    x = torch.randn(3, 6, dtype=torch.double, requires_grad=True)
    relevance = torch.randn(3, 5, dtype=torch.double)
    call = Call(layer, layer.forward, (x,), {})
    ways = rule.shortcut(layer, flow), rule.by_formula(layer, flow)
    short, plain = (torch.autograd.grad(way(call), x, relevance)[0] for way in ways)
    torch.testing.assert_close(short, plain, rtol=1e-9, atol=1e-9)


class Once(EpsilonRule):
    def propagate(self, step, relevance):
        self.count = getattr(self, "count", 0) + 1
        return super().propagate(step, relevance)


@pytest.mark.parametrize("flow", ["relevance", "gradient"])
def test_a_formula_of_ones_own_is_what_runs(flow):
    rule, x = Once(), torch.randn(3, 6, requires_grad=True)
    for layer in (nn.Linear(6, 5), nn.Sequential(nn.Linear(6, 5))):
        rule.bound(layer, flow)(Call(layer, layer.forward, (x,), {})).sum().backward()
    assert rule.count == 2


class InSteps(EpsilonRule):
    """The formula of epsilon as any formula of a user's is run: by a step."""

    def propagate(self, step, relevance):
        return super().propagate(step, relevance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("make, shape", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("rule", [EpsilonRule, UniformEpsilonRule, NormRule], ids=lambda rule: rule.__name__)
def test_a_layer_in_one_go_gives_what_a_step_gives(rule, make, shape, dtype):
    torch.manual_seed(0)
    layer = make().to(dtype)
    x = torch.randn(3, *shape).to(dtype)
    found = []
    for each in (rule(0.01), InSteps(0.01)):
        leaf = x.clone().requires_grad_()
        with each.register(layer):
            z = layer(leaf)
            (r,) = torch.autograd.grad(z, leaf, torch.ones_like(z))
        found.append(r)
    assert torch.equal(*found)


def test_a_stabiliser_that_is_set_anew_holds_for_layers_in_one_go():
    torch.manual_seed(0)
    layer, rule, x = nn.Linear(6, 5), EpsilonRule(0.01), torch.randn(3, 6, requires_grad=True)
    for epsilon in (0.5, 0.0, lambda z: z + 1):
        rule.epsilon = epsilon
        found = []
        for each in (rule, InSteps(epsilon)):
            with each.register(layer):
                z = layer(x)
                found += torch.autograd.grad(z, x, z)
        assert torch.equal(*found)
