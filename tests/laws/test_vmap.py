"""Rules inside `torch.vmap`: over samples, and over the parameters of an ensemble."""

import pytest
import torch
import torch.nn.functional as F
from tensordict import TensorDict, from_module
from torch import nn

from tdhook import LRP, Target
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


class Square(torch.autograd.Function):
    """One of a model's own, of which nothing else is known."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 2 * x * grad


EACH = {
    "quotient": lambda h: h * (h.square().mean(-1, keepdim=True) + 1).rsqrt(),
    "decay": lambda h: h * (-h.flip(-1)).exp(),
    "gate": lambda h: h * h.flip(-1).sigmoid() + (1 - h.flip(-1).sigmoid()) * h.tanh(),
    "square": lambda h: h * h,
    "own": lambda h: Square.apply(h) + h,
    "matrices": lambda h: h.unflatten(-1, (2, 3)) @ h.unflatten(-1, (2, 3)).mT,
    "layer norm": lambda h: F.layer_norm(h, (6,)),
    "cumulated product": lambda h: h.cumprod(-1),
    "cumulated exponentials": lambda h: h.logcumsumexp(-1),
    "largest": lambda h: h.topk(2).values,
    "in place": lambda h: (h * 1.0).mul_(2).add_(h).relu_(),
}


class Net(nn.Module):
    """What is computed of each element, all at once or in torch.vmap."""

    def __init__(self, function, maps):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.function = nn.Linear(4, 6), torch.vmap(function) if maps else function
        self.last = nn.Linear(function(torch.ones(1, 6)).numel(), 2)

    def forward(self, x):
        return self.last(self.function(self.first(x)).flatten(1))


@pytest.mark.parametrize("composite, baseline", [("epsilon", None), ("attn_lrp", None), ("deeplift", 0.3)])
@pytest.mark.parametrize("flow", ["relevance", "gradient"])
@pytest.mark.parametrize("name", EACH)
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_what_a_model_computes_inside_is_explained_as_outside(name, flow, composite, baseline):
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(1)).double()

    def explained(maps):
        lrp = LRP(composite, target=Target("output", 0), flow=flow, baseline=baseline, ledger=True)
        return lrp.wrap(Net(EACH[name], maps).double())(TensorDict({"input": x}, [3]))

    inside, outside = explained(True), explained(False)
    assert inside["ledger", "gap"].abs().max() < 1e-9
    torch.testing.assert_close(inside["attr", "input"], outside["attr", "input"], rtol=1e-6, atol=1e-8)
