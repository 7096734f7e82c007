"""Relevance through registered rules cannot be differentiated, and says so."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tdhook.rules import (
    AlphaBetaRule,
    EpsilonRule,
    FlatRule,
    GammaRule,
    LayerNormRule,
    PassRule,
    ReLUGuidedBackpropRule,
    SoftmaxEpsilonRule,
    ZPlusRule,
)

CASES = {
    "epsilon": (EpsilonRule(), nn.Linear(4, 3)),
    "zplus": (ZPlusRule(), nn.Linear(4, 3)),
    "alpha_beta": (AlphaBetaRule(), nn.Linear(4, 3)),
    "gamma": (GammaRule(), nn.Linear(4, 3)),
    "flat": (FlatRule(), nn.Linear(4, 3)),
    "a unit": (EpsilonRule(), nn.Sequential(nn.Linear(4, 3), nn.Tanh())),
    "norm": (LayerNormRule(), nn.LayerNorm(4)),
    "softmax": (SoftmaxEpsilonRule(), nn.Softmax(-1)),
    "pass": (PassRule(), nn.Tanh()),
    "guided": (ReLUGuidedBackpropRule(), nn.ReLU()),
}


def relevance(case: str, x: Tensor, *, again: bool) -> Tensor:
    rule, module = CASES[case]
    module = nn.Sequential(nn.Linear(4, 4), module).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
    with rule.register(module[1]):
        z = module(x)
        return torch.autograd.grad(z, x, z if again else z.detach(), create_graph=again)[0]


@pytest.mark.parametrize("case", CASES)
def test_the_second_backward_pass_raises(case: str) -> None:
    x = torch.linspace(-1, 1, 8).double().view(2, 4).requires_grad_()
    first = relevance(case, x, again=True)
    torch.testing.assert_close(first.detach(), relevance(case, x, again=False))
    with pytest.raises(RuntimeError, match="relevance cannot be differentiated"):
        first.square().sum().backward()


def test_gradients_beside_a_rule_are_differentiated() -> None:
    layer, x = nn.Linear(4, 3).double(), torch.randn(2, 4).double().requires_grad_()
    with ZPlusRule().register(layer):
        layer(x)
    (gradient,) = torch.autograd.grad(layer(x).tanh().sum(), x, create_graph=True)
    gradient.square().sum().backward()
    assert layer.weight.grad.abs().sum() > 0
