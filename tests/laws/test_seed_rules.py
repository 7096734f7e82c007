"""The rules that code written for tdhook 0.3 imports, each registered alone on a module."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tdhook.attribution.lrp_helpers.rules import (
    AHQKVRule,
    AlphaBetaRule,
    EpsilonRule,
    FlatRule,
    GammaRule,
    IgnoreRule,
    LayerNormRule,
    PassRule,
    PseudoIdentityRule,
    SoftmaxEpsilonRule,
    StopRule,
    UniformEpsilonRule,
    UniformRule,
    WSquareRule,
    stabilize,
)


class Sub(nn.Module):
    def forward(self, a, b, scale=1.0):
        return a - scale * b


def through(rule, module, *inputs, relevance):
    leaves = [x.clone().requires_grad_() for x in inputs]
    with rule.register(module):
        module(*leaves).backward(relevance)
    return [leaf.grad for leaf in leaves]


def test_epsilon_is_readable_and_settable():
    rule = EpsilonRule(epsilon=0.5)
    assert rule.epsilon == 0.5
    rule.epsilon = 2.0
    layer, x, r = nn.Linear(3, 2, dtype=torch.float64), torch.randn(3).double(), torch.randn(2).double()
    z = layer(x)
    (got,) = through(rule, layer, x, relevance=r)
    torch.testing.assert_close(got, x * (layer.weight.T @ (r / (z + 2.0 * z.sign()))))


def test_epsilon_without_inputs_that_require_grad_is_a_plain_forward():
    layer, x = nn.Linear(3, 2), torch.randn(4, 3)
    with EpsilonRule().register(layer):
        assert torch.equal(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias))
        with torch.no_grad():
            assert not layer(x).requires_grad


def test_epsilon_of_several_inputs_and_uniform_epsilon():
    a, b, r = torch.randn(2, 3).double(), torch.randn(2, 3).double(), torch.randn(2, 3).double()
    whole = through(EpsilonRule(0.1), Sub(), a, b, relevance=r)
    z = a - b
    torch.testing.assert_close(whole[0], a * r / (z + 0.1 * z.sign()))
    torch.testing.assert_close(whole[1], -b * r / (z + 0.1 * z.sign()))
    parts = through(UniformEpsilonRule(0.1), Sub(), a, b, relevance=r)
    assert isinstance(UniformEpsilonRule(), EpsilonRule)
    for part, all_of_it in zip(parts, whole, strict=True):
        torch.testing.assert_close(part, all_of_it / 2)


def test_pass_says_what_does_not_fit():
    x = torch.randn(2, 3, requires_grad=True)
    module = Sub()
    text = "PassRule requires the number of inputs and outputs to be the same"
    with PassRule().register(module), pytest.raises(ValueError, match=text):
        module(x, x)
    layer = nn.Linear(3, 2)
    text = r"Input \(shape=.*3.*\) and output \(shape=.*2.*\) have different shapes at index 0"
    with PassRule().register(layer), pytest.raises(ValueError, match=text):
        layer(x)


def test_ignore_leaves_the_module_and_its_gradient_alone():
    layer, x, r = nn.Linear(3, 2), torch.randn(4, 3), torch.randn(4, 2)
    attributes = dict(vars(layer))
    handle = IgnoreRule().register(layer)
    assert vars(layer) == attributes
    handle.remove()
    torch.testing.assert_close(through(IgnoreRule(), layer, x, relevance=r)[0], r @ layer.weight)


def test_shares_without_values():
    layer, x, r = nn.Linear(3, 2).double(), torch.randn(3).double(), torch.randn(2).double()
    w, b = layer.weight.detach(), layer.bias.detach()
    (got,) = through(WSquareRule(0.1), layer, x, relevance=r)
    torch.testing.assert_close(got, (w**2).T @ (r / ((w**2).sum(1) + b**2 + 0.1)))
    (got,) = through(FlatRule(0.1), layer, x, relevance=r)
    torch.testing.assert_close(got, (r / 3.1).sum().expand(3))
    assert isinstance(FlatRule(), WSquareRule)
    (got,) = through(StopRule(), layer, x, relevance=r)
    assert got is None or not got.any()
    y, r = torch.randn(4).double(), torch.randn(4).double()
    for got in through(UniformRule(), Sub(), y, y, relevance=r):
        torch.testing.assert_close(got, r / 2)


def test_alpha_beta_checks_its_arguments_and_inputs():
    for alpha, beta in ((-1.0, -2.0), (1.0, -0.5), (-0.5, 0.5)):
        with pytest.raises(ValueError, match=r"^Both alpha and beta parameters must be non-negative!$"):
            AlphaBetaRule(alpha, beta)
    with pytest.raises(ValueError, match=r"^The difference of parameters alpha - beta must equal 1!$"):
        AlphaBetaRule(2.0, 0.5)
    x, module = torch.randn(2, 3, requires_grad=True), Sub()
    with (
        AlphaBetaRule().register(module),
        pytest.raises(NotImplementedError, match="AlphaBetaRule does not support multi"),
    ):
        module(x, x)


def test_rules_in_the_gradient_convention():
    x, r = torch.randn(2, 6).double(), torch.randn(2, 6).double()
    s = x.softmax(-1)
    (got,) = through(SoftmaxEpsilonRule(), nn.Softmax(-1), x, relevance=r)
    torch.testing.assert_close(got, (r - s * r.sum(-1, keepdim=True)) * x)
    assert isinstance(SoftmaxEpsilonRule(), EpsilonRule)

    norm = nn.LayerNorm(6).double()
    torch.nn.init.normal_(norm.weight)
    leaf = x.clone().requires_grad_()
    std = (leaf.var(-1, correction=0, keepdim=True) + norm.eps).sqrt().detach()
    ((leaf - leaf.mean(-1, keepdim=True)) / std * norm.weight + norm.bias).backward(r)
    (got,) = through(LayerNormRule(), norm, x, relevance=r)
    torch.testing.assert_close(got, leaf.grad)

    gelu = nn.GELU()
    (got,) = through(PseudoIdentityRule(0.1), gelu, x, relevance=r)
    torch.testing.assert_close(got, gelu(x) / stabilize(x, 0.1) * r)

    projection = nn.Linear(6, 6).double()
    (got,) = through(AHQKVRule(), projection, x, relevance=r)
    torch.testing.assert_close(got, r[:, 4:] @ projection.weight[4:])
    for rule in (PseudoIdentityRule(), LayerNormRule()):
        leaf, module = torch.randn(2, 3, requires_grad=True), Sub()
        with (
            rule.register(module),
            pytest.raises(NotImplementedError, match="does not support multiple inputs"),
        ):
            module(leaf, leaf)


@pytest.mark.parametrize("rule", [EpsilonRule, WSquareRule, GammaRule, AlphaBetaRule, PseudoIdentityRule])
def test_a_stabiliser_is_a_number_or_a_callable(rule):
    name = "epsilon" if rule is EpsilonRule else "stabilizer"
    with pytest.raises(TypeError, match=f"{name} is a float or a callable on the denominator, got 'small'"):
        rule(**{name: "small"})
    with pytest.raises(
        ValueError, match=f"{name} moves denominators away from zero, so it is not negative, got -1"
    ):
        rule(**{name: -1})
