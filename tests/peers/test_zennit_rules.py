"""Every rule that zennit has too gives the same relevance on every kind of linear layer, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tdhook.rules import (
    AlphaBetaRule,
    EpsilonRule,
    FlatRule,
    GammaRule,
    NormRule,
    PassRule,
    ReLUBetaSmoothRule,
    ReLUDeconvNetRule,
    ReLUGuidedBackpropRule,
    Rule,
    WSquareRule,
    ZBoxRule,
    ZPlusRule,
)

from .models import assert_equal

rules = pytest.importorskip("zennit.rules", reason="zennit is not installed; `nox -s peers` installs it")

pytestmark = pytest.mark.peers

FLOAT64 = 1e-9
LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(12, 7), (12,)),
    "linear, no bias": (lambda: nn.Linear(12, 7, bias=False), (12,)),
    "linear on a sequence": (lambda: nn.Linear(12, 7), (4, 12)),
    "conv1d, strided": (lambda: nn.Conv1d(3, 4, 3, stride=2, padding=1), (3, 9)),
    "conv2d": (lambda: nn.Conv2d(3, 4, 3), (3, 7, 6)),
    "conv2d, no bias": (lambda: nn.Conv2d(3, 4, 3, bias=False), (3, 7, 6)),
    "conv2d, grouped": (lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2), (4, 5, 6)),
    "conv2d, dilated": (lambda: nn.Conv2d(3, 4, (3, 2), dilation=2, padding="same"), (3, 7, 6)),
    "conv2d, circular": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), (3, 5, 6)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, stride=(1, 2, 1)), (2, 4, 5, 3)),
    "transposed conv1d": (lambda: nn.ConvTranspose1d(3, 4, 3, stride=2), (3, 5)),
    "transposed conv2d": (
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
        (4, 4, 3),
    ),
}
LINEAR: dict[str, tuple[type[Rule], str, dict[str, Any]]] = {
    "epsilon": (EpsilonRule, "Epsilon", {}),
    "epsilon, large": (EpsilonRule, "Epsilon", {"epsilon": 0.5}),
    "gamma": (GammaRule, "Gamma", {}),
    "gamma, large": (GammaRule, "Gamma", {"gamma": 2.0, "stabilizer": 0.1}),
    "alpha2-beta1": (AlphaBetaRule, "AlphaBeta", {}),
    "alpha1-beta0": (AlphaBetaRule, "AlphaBeta", {"alpha": 1.0, "beta": 0.0, "stabilizer": 0.1}),
    "alpha1.5-beta0.5": (AlphaBetaRule, "AlphaBeta", {"alpha": 1.5, "beta": 0.5}),
    "z-plus": (ZPlusRule, "ZPlus", {}),
    "z-box": (ZBoxRule, "ZBox", {"low": -3.0, "high": 2.5}),
    "w-square": (WSquareRule, "WSquare", {}),
    "w-square, stabilised": (WSquareRule, "WSquare", {"stabilizer": 0.1}),
    "flat": (FlatRule, "Flat", {}),
    "norm": (NormRule, "Norm", {"stabilizer": 0.1}),
}


def inputs(batch: int, shape: tuple[int, ...], sign: str) -> Tensor:
    x = torch.randn(batch, *shape, dtype=torch.float64).clamp(-3, 2.5)
    # Zeros among them, as a ReLU leaves.
    return x if sign == "signed" else x.clamp(min=0)


def compare(ours: Rule, theirs: Any, layer: nn.Module, x: Tensor, reference: nn.Module | None = None) -> None:
    """The relevance of ``x`` for some relevance of either sign; zennit's at ``reference``, if that is another layer."""
    found = []
    relevance = torch.randn_like(layer(x))
    for rule, module in ((ours, layer), (theirs.copy(), reference or layer)):
        leaf = x.clone().requires_grad_()
        handle = rule.register(module)
        # The rule reads the layer in the backward pass, too.
        found.append(torch.autograd.grad(module(leaf), leaf, relevance)[0])
        handle.remove()
    assert_equal(*found, FLOAT64)


@pytest.mark.parametrize("sign", ["signed", "non-negative"])
@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("rule", LINEAR)
@pytest.mark.parametrize("layer", LAYERS)
def test_linear_rule(layer: str, rule: str, batch: int, sign: str) -> None:
    build, shape = LAYERS[layer]
    ours, theirs, given = LINEAR[rule]
    compare(ours(**given), getattr(rules, theirs)(**given), build().double(), inputs(batch, shape, sign))


@pytest.mark.parametrize("names", ["bias", ["bias"]])
@pytest.mark.parametrize("rule", [name for name in LINEAR if name not in ("norm", "gamma", "gamma, large")])
@pytest.mark.parametrize("layer", ["linear", "conv2d", "conv2d, grouped", "transposed conv2d"])
def test_zero_params(layer: str, rule: str, names: str | list[str]) -> None:
    build, shape = LAYERS[layer]
    ours, theirs, given = LINEAR[rule]
    given = given | {"zero_params": names}
    compare(ours(**given), getattr(rules, theirs)(**given), build().double(), inputs(5, shape, "signed"))


@pytest.mark.parametrize("layer", ["linear", "conv2d", "conv2d, grouped", "transposed conv2d"])
def test_zero_params_of_gamma(layer: str) -> None:
    build, shape = LAYERS[layer]
    module, unbiased = build().double(), build().double()
    unbiased.load_state_dict(module.state_dict())
    nn.init.zeros_(unbiased.bias)
    ours, x = GammaRule(zero_params="bias"), inputs(5, shape, "signed")
    compare(ours, rules.Gamma(), module, x, unbiased)
    # zennit itself favours contributions by the sign of an output that still has its bias.
    with pytest.raises(AssertionError, match="relative error"):
        compare(ours, rules.Gamma(zero_params="bias"), module, x)


def test_bounds_per_channel() -> None:
    low, high = -torch.rand(1, 3, 1, 1).double() - 3, torch.rand(1, 3, 1, 1).double() + 3
    compare(
        ZBoxRule(low, high),
        rules.ZBox(low, high),
        nn.Conv2d(3, 4, 3).double(),
        inputs(5, (3, 6, 6), "signed"),
    )


def test_gamma_favours_the_positive_where_the_output_is_zero() -> None:
    # Of z' = (1 + 1) * 1 - 1 = 1, the inputs take 2 and -1. zennit favours neither, and the relevance is lost.
    layer = nn.Linear(2, 1, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, -1.0]]))
    found = []
    for rule in (GammaRule(gamma=1.0, stabilizer=0.0), rules.Gamma(gamma=1.0, stabilizer=0.0)):
        x = torch.ones(1, 2, dtype=torch.float64, requires_grad=True)
        handle = rule.register(layer)
        found.append(torch.autograd.grad(layer(x), x, torch.ones(1, 1, dtype=torch.float64))[0].tolist())
        handle.remove()
    assert found == [[[2.0, -1.0]], [[0.0, 0.0]]]


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize(
    "layer",
    [nn.AvgPool2d(2), nn.AvgPool2d(3, stride=2, padding=1), nn.AdaptiveAvgPool2d((3, 2))],
    ids=["plain", "overlapping", "adaptive"],
)
def test_norm_of_average_pooling(layer: nn.Module, batch: int) -> None:
    compare(NormRule(1e-3), rules.Norm(1e-3), layer, inputs(batch, (3, 7, 6), "signed"))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    "ours,theirs",
    [
        (PassRule(), "Pass"),
        (ReLUDeconvNetRule(), "ReLUDeconvNet"),
        (ReLUGuidedBackpropRule(), "ReLUGuidedBackprop"),
        (ReLUBetaSmoothRule(), "ReLUBetaSmooth"),
    ],
    ids=repr,
)
def test_activation_rule(ours: Rule, theirs: str, inplace: bool) -> None:
    # zennit's smoothed ReLU reads what an in-place ReLU has overwritten.
    reference = nn.ReLU(inplace and theirs != "ReLUBetaSmooth")
    compare(ours, getattr(rules, theirs)(), nn.ReLU(inplace), inputs(5, (3, 4), "signed"), reference)
