"""Conventions that meet: rules of relevance and of gradients in one model."""

from __future__ import annotations

import torch
from explained_models import explain, mlp
from tensordict import TensorDict
from torch import nn

from tdhook import LRP, Target
from tdhook.rules import (
    EpsilonRule,
    LayerNormRule,
    PseudoIdentityRule,
    ZPlusRule,
    stabilize,
)


def test_gradient_rules_in_the_relevance_flow():
    first, norm, gelu, last = nn.Linear(3, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 2)
    model = nn.Sequential(first, norm, gelu, last).double()
    torch.nn.init.normal_(norm.weight)
    eps = 0.01
    composite = [
        (nn.Linear, EpsilonRule(eps)), (nn.LayerNorm, LayerNormRule()), (nn.GELU, PseudoIdentityRule(eps))
    ]  # fmt: skip
    td = explain(
        model,
        TensorDict(input=torch.randn(5, 3).double(), batch_size=[5]),
        composite,
        target=Target("output", 1),
        flow="relevance",
    )
    with torch.no_grad():
        x = td["input"]
        a, w = first(x), norm.weight
        b = norm(a)
        c = gelu(b)
        z = last(c)
        r = z * torch.tensor([0.0, 1.0])
        r = c * (r / stabilize(z, eps) @ last.weight)
        g = (
            r / c * c / stabilize(b, eps)
        )  # the identity rule as a gradient, between relevance before and after it
        r = b * g
        g = w * r / b
        g = (g - g.mean(-1, keepdim=True)) / (a.var(-1, correction=0, keepdim=True) + norm.eps).sqrt()
        r = a * g
        r = x * (r / stabilize(a, eps) @ first.weight)
    torch.testing.assert_close(td["attr", "input"], r)


def test_the_flow_is_the_one_that_nothing_need_be_converted_to():
    model = nn.Sequential(nn.Linear(3, 6), nn.LayerNorm(6), nn.Linear(6, 2))
    norm = (nn.LayerNorm, LayerNormRule())
    assert LRP([norm]).plan(model).flow == "gradient"
    assert LRP([norm, (nn.Linear, EpsilonRule(0.01))]).plan(model).flow == "gradient"
    assert LRP([norm, (nn.Linear, EpsilonRule(0.01, zero_params="bias"))]).plan(model).flow == "relevance"
    assert LRP([norm, (nn.Linear, ZPlusRule())]).plan(model).flow == "relevance"
    # What a mapper's rules bring to the inputs is written as it is: relevance, if one of them says so.
    rules = {nn.LayerNorm: LayerNormRule(), nn.Linear: EpsilonRule(0.01)}
    assert LRP(rule_mapper=lambda name, module: rules.get(type(module))).plan(model).flow == "relevance"


def test_a_modified_gradient_is_given_as_it_is():
    model = mlp()
    td = explain(
        model,
        TensorDict(input=torch.randn(5, 3).double(), batch_size=[5]),
        "deconvnet",
        target=Target("output", 1),
    )
    first, _, last = model
    torch.testing.assert_close(td["attr", "input"], (last.weight[1].clamp(min=0) @ first.weight).expand(5, 3))
