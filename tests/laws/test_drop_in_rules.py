"""Rules written for tdhook 0.3 run unchanged. Literal figures are what tdhook 0.3.0 printed for the same script."""

from __future__ import annotations

import pytest
import torch
from drop_in import X, fixed, mlp, run, values
from tensordict import TensorDict
from torch import nn

from tdhook.attribution import LRP
from tdhook.attribution.lrp_helpers.rules import (
    AHQKVRule,
    EpsilonPlus,
    EpsilonRule,
    LayerNormRule,
    ParamModifier,
    PassRule,
    PseudoIdentityRule,
    Rule,
    StopRule,
    stabilize,
)


class Gamma(Rule):
    """Keeps the module and asks it again in the backward pass, with other parameters."""

    def __init__(self, gamma=0.5):
        super().__init__()
        self._apply_kwargs["gamma"] = gamma

    @staticmethod
    def forward(ctx, apply_kwargs, module, model_kwargs, *inputs):
        ctx.gamma, ctx.module = apply_kwargs["gamma"], module
        ctx.save_for_backward(*inputs)
        return module._prev_forward(*inputs, **model_kwargs)

    @staticmethod
    def backward(ctx, *out_relevance):
        (x,) = ctx.saved_tensors
        modifier = ParamModifier(lambda name, p: p + ctx.gamma * p.clamp(min=0), ParamModifier.select_all)
        with torch.enable_grad(), modifier(ctx.module):
            leaf = x.detach().requires_grad_()
            z = ctx.module._prev_forward(leaf)
        (grad,) = torch.autograd.grad(z, leaf, out_relevance[0] / stabilize(z))
        return None, None, None, x.detach() * grad


def test_a_users_rule_in_a_users_mapper():
    model, x = mlp(), torch.rand(5, 3)

    def mine(name, module):
        return Gamma(0.5) if isinstance(module, nn.Linear) else None

    lrp = LRP(
        rule_mapper=EpsilonPlus(rule_mapper=mine), skip_modules=LRP.default_skip, init_attr_grads=values
    )
    got = run(lrp, model, TensorDict(input=x, batch_size=[5]))["attr", "input"]
    h = model[1](model[0](x)).detach()
    r = model(x).detach()
    for layer, value in ((model[2], h), (model[0], x)):
        w, b = (p + 0.5 * p.clamp(min=0) for p in (layer.weight, layer.bias))
        r = value * (r / stabilize(value @ w.T + b) @ w)
    torch.testing.assert_close(got, r.detach(), rtol=1e-3, atol=1e-4)
    assert "_prev_forward" not in vars(model[0])


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.inp, self.norm, self.qkv = nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 18)
        self.softmax, self.act = nn.Softmax(-1), nn.GELU()

    def forward(self, x):
        q, k, v = self.qkv(self.norm(self.inp(x))).chunk(3, -1)
        return self.act(self.softmax(q @ k.transpose(-1, -2)) @ v)


@pytest.mark.parametrize("softmax", [None, StopRule()], ids=["softmax left alone", "softmax stopped"])
def test_rules_in_the_gradient_convention_give_what_they_gave(softmax):
    """Tdhook 0.3 multiplied by no input: with these rules its users do that themselves."""
    model, x = Attention().double(), torch.randn(2, 5, 6).double()
    rules = {"norm": LayerNormRule(), "act": PseudoIdentityRule(), "qkv": AHQKVRule(), "softmax": softmax}
    lrp = LRP(rule_mapper=lambda name, module: rules.get(name), warn_on_missing_rule=False)
    got = run(lrp, model, TensorDict(input=x, batch_size=[2]))["attr", "input"]
    leaf = x.clone().requires_grad_()
    h = model.inp(leaf)
    std = (h.var(-1, correction=0, keepdim=True) + model.norm.eps).sqrt().detach()
    q, k, v = model.qkv((h - h.mean(-1, keepdim=True)) / std * model.norm.weight + model.norm.bias).chunk(
        3, -1
    )
    y = model.softmax(q @ k.transpose(-1, -2)).detach() @ v
    out = y * (model.act(y) / stabilize(y)).detach()
    torch.testing.assert_close(got, torch.autograd.grad(out.sum(), leaf)[0])


def test_rules_of_ones_own_registered_by_hand():
    """The oldest way: rules on modules, without any context."""
    model, x = fixed(), X.clone().requires_grad_()
    handles = [
        EpsilonRule(0.5).register(model[0]),
        PassRule().register(model[1]),
        EpsilonRule(0.5).register(model[2]),
    ]
    model(x).backward(torch.ones(3, 2))
    for handle in handles:
        handle.remove()
    expected = [[1.8409, 0.1534], [2.9878, -0.7959], [-0.7083, 1.4167]]
    torch.testing.assert_close(x.grad, torch.tensor(expected), atol=1e-4, rtol=0)
