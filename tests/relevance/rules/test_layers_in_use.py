"""Layers one after the other, called twice, frozen, learning: the rules of linear layers where they are at work."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

from . import reference
from .cases import every_rule, some_layers
from .checks import assert_close, registered_relevance
from .layers import DTYPE

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")


@every_rule
def test_one_after_the_other(rule):
    """The relevance of what lies between two layers is handed from the one to the other."""
    rule, name, parameters = rule
    torch.manual_seed(0)
    first, second = nn.Linear(4, 3, dtype=DTYPE), nn.Linear(3, 2, dtype=DTYPE)
    x, r = torch.randn(2, 4, dtype=DTYPE, requires_grad=True), torch.randn(2, 2, dtype=DTYPE)
    with rule.register(first), rule.register(second):
        middle = first(x)
        second(middle).backward(r)
    between = reference.relevance(name, reference.explicit(second, (3,)), middle, r, **parameters)
    expected = reference.relevance(name, reference.explicit(first, (4,)), x, between, **parameters)
    assert_close(x.grad, expected)


@some_layers
@every_rule
def test_called_with_its_input_by_name(case, rule):
    rule, name, parameters = rule
    x, r = case.draw(True, 2)
    leaf = x.clone().requires_grad_()
    with rule.register(case.layer):
        case.layer(input=leaf).backward(r)
    assert_close(leaf.grad, reference.relevance(name, case.explicit, x, r, **parameters))


class Wrapped(nn.Module):
    """A layer inside a module: what is linear need not look so."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


@some_layers
@every_rule
def test_inside_another_module(case, rule):
    """The rules go by the parameters' own names, wherever these sit."""
    rule, name, parameters = rule
    x, r = case.draw(True, 2)
    (actual,) = registered_relevance(rule, Wrapped(case.layer), [x], r)
    assert_close(actual, reference.relevance(name, case.explicit, x, r, **parameters))


@some_layers
@every_rule
def test_called_twice_each_call_keeps_its_own_input(case, rule):
    rule, name, parameters = rule
    (x, r), (y, _) = case.draw(True, 2), case.draw(False, 2)
    x, y = x.requires_grad_(), y.requires_grad_()
    with rule.register(case.layer):
        first, second = case.layer(x), case.layer(y)
    first.backward(r, retain_graph=True)
    second.backward(r)
    assert_close(x.grad, reference.relevance(name, case.explicit, x, r, **parameters))
    assert_close(y.grad, reference.relevance(name, case.explicit, y, r, **parameters))
    first.backward(r)
    assert_close(x.grad, 2 * reference.relevance(name, case.explicit, x, r, **parameters))


@every_rule
def test_the_weights_of_today_are_used(rule):
    """A layer that learns between two explanations is explained with what it has learnt."""
    rule, name, parameters = rule
    torch.manual_seed(0)
    layer = nn.Linear(4, 3, dtype=DTYPE)
    x, r = torch.randn(2, 4, dtype=DTYPE), torch.randn(2, 3, dtype=DTYPE)

    def check_now():
        (actual,) = registered_relevance(rule, layer, [x], r)
        assert_close(actual, reference.relevance(name, reference.explicit(layer, (4,)), x, r, **parameters))

    check_now()
    with torch.no_grad():
        layer.weight.mul_(-1.5).add_(0.1)
        layer.bias.sub_(0.3)
    check_now()
    layer.weight.data = torch.randn(3, 4, dtype=DTYPE)
    layer.bias.data.neg_()
    check_now()
    layer.load_state_dict(nn.Linear(4, 3, dtype=DTYPE).state_dict())
    check_now()
    layer.weight = nn.Parameter(torch.randn(3, 4, dtype=DTYPE))
    check_now()


@every_rule
def test_a_reparametrised_weight(rule):
    rule, name, parameters = rule
    torch.manual_seed(0)
    layer = torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 3, dtype=DTYPE))
    x, r = torch.randn(2, 4, dtype=DTYPE), torch.randn(2, 3, dtype=DTYPE)
    (actual,) = registered_relevance(rule, layer, [x], r)
    assert_close(actual, reference.relevance(name, reference.explicit(layer, (4,)), x, r, **parameters))


@some_layers
@every_rule
def test_frozen_weights_and_no_gradient_for_weights(case, rule):
    """Parameters need no gradient, and get none: what travels backwards is no gradient of theirs."""
    rule, name, parameters = rule
    x, r = case.draw(True, 2)
    expected = reference.relevance(name, case.explicit, x, r, **parameters)
    for frozen in (False, True):
        layer = copy.deepcopy(case.layer).requires_grad_(not frozen)
        leaf = x.clone().requires_grad_()
        with rule.register(layer):
            layer(leaf).backward(r)
        assert_close(leaf.grad, expected)
        assert all(p.grad is None and p.requires_grad is not frozen for p in layer.parameters())


@some_layers
@every_rule
def test_without_an_input_that_needs_it_the_forward_is_plain(case, rule):
    x, _ = case.draw(True, 2)
    layer = copy.deepcopy(case.layer)
    with rule[0].register(layer):
        out = layer(x)
        with torch.no_grad():
            assert torch.equal(layer(x.clone().requires_grad_()), out)
        with torch.inference_mode():
            assert torch.equal(layer(x), out)
    assert torch.equal(out, case.layer(x))


@some_layers
@every_rule
def test_removed_means_gone(case, rule):
    x, r = case.draw(True, 2)
    layer = copy.deepcopy(case.layer)
    forward = layer.forward
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        handle = rule[0].register(layer)
        handle.remove()
        handle.remove()
    assert layer.forward == forward
    assert "forward" not in vars(layer)
    leaf, plain = x.clone().requires_grad_(), x.clone().requires_grad_()
    layer(leaf).backward(r)
    case.layer(plain).backward(r)
    assert torch.equal(leaf.grad, plain.grad)
    case.layer.zero_grad()
