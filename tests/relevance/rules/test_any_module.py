"""Several inputs, several outputs, keyword arguments: the rules that need no closed form, on any module."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tdhook.rules import EpsilonRule, PassRule, UniformEpsilonRule, UniformRule

from . import reference
from .checks import as_tuple, assert_close, registered_relevance
from .layers import DTYPE, Product, draw

any_batch = pytest.mark.parametrize("batch", [(), (3,), (2, 3), (2, 1, 2)], ids=str)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_uniform(n):
    inputs, r = [draw(2, 3, seed=s) for s in range(n)], draw(2, 3, seed=9)
    for actual in registered_relevance(UniformRule(), Product(), inputs, r):
        assert_close(actual, reference.uniform(n, r))


@any_batch
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "rule, parts", [(EpsilonRule(1e-3), 1), (UniformEpsilonRule(1e-3), 2)], ids=["whole", "half"]
)
def test_two_inputs(rule, parts, bias, batch):
    module = nn.Bilinear(3, 4, 2, bias=bias, dtype=DTYPE)
    a, b, r = draw(*batch, 3), draw(*batch, 4, seed=1), draw(*batch, 2, seed=2)
    actual = registered_relevance(rule, module, [a, b], r)
    expected = (
        reference.generic_epsilon(lambda a: module(a, b), a, r, stab=1e-3),
        reference.generic_epsilon(lambda b: module(a, b), b, r, stab=1e-3),
    )
    for have, want in zip(actual, expected, strict=True):
        assert_close(have, want / parts)


def test_only_one_of_two_inputs_needs_relevance():
    module = nn.Bilinear(3, 4, 2, dtype=DTYPE)
    a, b, r = draw(2, 3), draw(2, 4, seed=1).requires_grad_(), draw(2, 2, seed=2)
    with EpsilonRule().register(module):
        module(a, b).backward(r)
    assert a.grad is None
    assert_close(b.grad, reference.generic_epsilon(lambda b: module(a, b), b, r))


class Curved(nn.Module):
    """Parameters, a constant, and nothing linear."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 3, dtype=DTYPE)

    def forward(self, x, power=2, *, scale=1.0):
        return scale * (self.inner(x).exp() + x[..., :1] ** power)


@any_batch
def test_nonlinear_module(batch):
    module, x, r = Curved(), draw(*batch, 4), draw(*batch, 3, seed=1)
    for stab in (1e-6, lambda z: z + 2.0):
        (actual,) = registered_relevance(EpsilonRule(stab), module, [x], r)
        assert_close(actual, reference.generic_epsilon(module, x, r, stab=stab))


@pytest.mark.parametrize("scale", [3.0, torch.tensor(3.0, dtype=DTYPE)], ids=["number", "tensor"])
def test_keyword_arguments_reach_the_module(scale):
    module, x, r = Curved(), draw(2, 4), draw(2, 3, seed=1)
    (actual,) = registered_relevance(EpsilonRule(), module, [x], r, scale=scale, power=3)
    assert_close(actual, reference.generic_epsilon(lambda x: module(x, 3, scale=3.0), x, r))


def test_arguments_that_are_no_tensors():
    module, x, r = Curved(), draw(2, 4).requires_grad_(), draw(2, 3, seed=1)
    with EpsilonRule().register(module):
        module(x, 3).backward(r)
    assert_close(x.grad, reference.generic_epsilon(lambda x: module(x, 3), x, r))


@pytest.mark.parametrize("module", [nn.Linear(4, 3), Curved()], ids=["closed_form", "generic"])
def test_an_input_given_by_its_name(module):
    module, x, r = module.double(), draw(2, 4).requires_grad_(), draw(2, 3, seed=1)
    name = "input" if isinstance(module, nn.Linear) else "x"
    with EpsilonRule().register(module):
        module(**{name: x}).backward(r)
    assert_close(x.grad, reference.generic_epsilon(module, x, r))


class Doubled(nn.Linear):
    """A linear layer whose forward pass is its own."""

    def forward(self, input):
        return torch.nn.functional.linear(input, 2 * self.weight, self.bias) ** 2


def test_a_subclass_with_a_forward_of_its_own_has_no_closed_form():
    module, x, r = Doubled(4, 3, dtype=DTYPE), draw(2, 4), draw(2, 3, seed=1)
    (actual,) = registered_relevance(EpsilonRule(), module, [x], r)
    assert_close(actual, reference.generic_epsilon(module, x, r))


class Fork(nn.Module):
    def forward(self, x):
        return x.exp(), x[..., :2] ** 3


@any_batch
def test_several_outputs(batch):
    module, x = Fork(), draw(*batch, 4)
    relevance = [draw(*batch, 4, seed=1), draw(*batch, 2, seed=2)]
    (actual,) = registered_relevance(EpsilonRule(1e-3), module, [x], relevance)
    expected = sum(
        reference.generic_epsilon(lambda x, n=n: module(x)[n], x, r, stab=1e-3)
        for n, r in enumerate(relevance)
    )
    assert_close(actual, expected)


@pytest.mark.parametrize("n", [0, 1])
def test_an_output_that_nobody_uses_has_no_relevance(n):
    module, x = Fork(), draw(3, 4)
    r = draw(*module(x)[n].shape, seed=1)
    leaf = x.clone().requires_grad_()
    with EpsilonRule().register(module):
        module(leaf)[n].backward(r)
    assert_close(leaf.grad, reference.generic_epsilon(lambda x: module(x)[n], x, r))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU], ids=["lstm", "gru"])
@pytest.mark.parametrize("batch", [(), (2,)], ids=str)
def test_recurrent_layers(kind, batch):
    """Their outputs are nested tuples; the rule is ``x * J^T (r / stab(z))`` all the same."""
    torch.manual_seed(0)
    module = kind(3, 2, dtype=DTYPE, batch_first=True)
    x = draw(*batch, 4, 3)
    flat_outputs = as_tuple(module(x))
    relevance = [draw(*out.shape, seed=n) for n, out in enumerate(flat_outputs)]
    (actual,) = registered_relevance(EpsilonRule(1e-2), module, [x], relevance)
    leaf = x.clone().requires_grad_()
    outputs = as_tuple(module(leaf))
    weighted = [r / reference.stabiliser(1e-2)(z.detach()) for r, z in zip(relevance, outputs, strict=True)]
    (pulled_back,) = torch.autograd.grad(outputs, leaf, weighted)
    assert_close(actual, x * pulled_back)


def test_only_the_sequence_of_an_lstm_is_used():
    torch.manual_seed(0)
    module, x = nn.LSTM(3, 2, dtype=DTYPE), draw(4, 2, 3)
    r, leaf = draw(4, 2, 2, seed=1), x.clone().requires_grad_()
    with EpsilonRule().register(module):
        out, (h, c) = module(leaf)
        out.backward(r)
    assert h.shape == c.shape == (1, 2, 2)
    assert_close(leaf.grad, reference.generic_epsilon(lambda x: module(x)[0], x, r))


@pytest.mark.parametrize("module", [nn.Identity(), nn.Dropout(0.5).eval(), nn.Flatten()], ids=str)
@pytest.mark.parametrize("rule", [PassRule(), UniformRule(), EpsilonRule(0.0)], ids=str)
def test_a_module_that_returns_its_very_input(module, rule):
    x, r = draw(2, 4), draw(2, 4, seed=1)
    (actual,) = registered_relevance(rule, module, [x], r)
    assert_close(actual, r)
    middle = x.clone().requires_grad_()
    with rule.register(module):
        (module(middle * 2) * r).sum().backward()
    assert_close(middle.grad, 2 * r)
