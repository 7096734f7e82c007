"""The extension contract: a user's rule with a forward and a backward of its own."""

from __future__ import annotations

import torch
from torch import nn

from tdhook.attribution.lrp_helpers.rules import (
    RemovableRuleHandle,
    Rule,
)


class Halves(Rule):
    """As a user of tdhook 0.3 writes one: half of the gradient, ``k`` times."""

    def __init__(self, k=1.0):
        super().__init__()
        self._apply_kwargs["k"] = k

    @staticmethod
    def forward(ctx, apply_kwargs, module, model_kwargs, *inputs):
        ctx.k, ctx.n = apply_kwargs["k"], len(inputs)
        ctx.seen = (type(module).__name__, dict(model_kwargs))
        return module._prev_forward(*inputs, **model_kwargs)

    @staticmethod
    def backward(ctx, *out_relevance):
        return None, None, None, *(ctx.k * out_relevance[0] / 2 for _ in range(ctx.n))


class Late(Rule):
    """Looks at the module again in the backward pass."""

    @staticmethod
    def forward(ctx, apply_kwargs, module, model_kwargs, *inputs):
        ctx.module = module
        ctx.save_for_backward(*inputs)
        return module._prev_forward(*inputs, **model_kwargs)

    @staticmethod
    def backward(ctx, *out_relevance):
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            z = ctx.module._prev_forward(leaf)
        return None, None, None, 3 * torch.autograd.grad(z, leaf, out_relevance[0])[0]


class Sub(nn.Module):
    def forward(self, a, b, scale=1.0):
        return a - scale * b


def test_a_users_rule_registers_like_any_other():
    a, b = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    module, r = Sub(), torch.randn(2, 3)
    with Halves(k=3.0).register(module):
        z = module(a, b, scale=2.0)
        assert torch.equal(z, a - 2 * b)
        z.backward(r)
    torch.testing.assert_close(a.grad, 1.5 * r)
    torch.testing.assert_close(b.grad, 1.5 * r)


def test_a_users_rule_may_call_the_module_in_its_backward_pass():
    layer, x = nn.Linear(3, 2), torch.randn(4, 3, requires_grad=True)
    with Late().register(layer):
        layer(x).sum().backward()
    torch.testing.assert_close(x.grad, 3 * layer.weight.sum(0).expand(4, 3))


def test_users_rules_with_different_arguments_are_different():
    assert Halves(2.0) == Halves(2.0)
    assert Halves(1.0) != Halves(2.0)


class OwnRegistration(Rule):
    """Replaces ``forward`` in its own way, as :class:`IgnoreRule` does nothing in its own way."""

    def register(self, module):
        module._mine = module.forward
        module.forward = lambda *args: module._mine(*args) * 1
        return RemovableRuleHandle(self, module)

    def unregister(self, module):
        module.forward = module._mine
        del module._mine

    @staticmethod
    def forward(ctx, apply_kwargs, module, model_kwargs, *inputs): ...

    @staticmethod
    def backward(ctx, *out_relevance): ...


def test_a_handle_calls_the_unregister_of_its_rule():
    layer = nn.Linear(3, 2)
    forward = layer.forward
    with OwnRegistration().register(layer):
        assert layer.forward != forward
    assert layer.forward == forward
