"""Arguments of rules: what makes no sense is refused where the rule is made, or where it meets the model."""

from __future__ import annotations

import math

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from tdhook import LRP, Target
from tdhook.composites import epsilon_plus, preset
from tdhook.relevance.rules.data import rule_from_dict
from tdhook.rules import (
    AlphaBetaRule,
    AttentionRule,
    EpsilonRule,
    FlatRule,
    GammaRule,
    NormRule,
    PseudoIdentityRule,
    ReLUBetaSmoothRule,
    SignalTakeAllRule,
    SoftmaxEpsilonRule,
    UniformEpsilonRule,
    WSquareRule,
    ZBoxRule,
    ZPlusRule,
)

NUMBERS = [
    (EpsilonRule, "epsilon", {}),
    (UniformEpsilonRule, "epsilon", {}),
    (SoftmaxEpsilonRule, "epsilon", {}),
    (NormRule, "stabilizer", {}),
    (WSquareRule, "stabilizer", {}),
    (FlatRule, "stabilizer", {}),
    (ZPlusRule, "stabilizer", {}),
    (PseudoIdentityRule, "stabilizer", {}),
    (AlphaBetaRule, "alpha", {"beta": 1.0}),
    (AlphaBetaRule, "beta", {"alpha": 2.0}),
    (AlphaBetaRule, "stabilizer", {}),
    (GammaRule, "gamma", {}),
    (GammaRule, "stabilizer", {}),
    (ZBoxRule, "low", {"high": 1.0}),
    (ZBoxRule, "high", {"low": 0.0}),
    (ZBoxRule, "stabilizer", {"low": 0.0, "high": 1.0}),
    (ReLUBetaSmoothRule, "beta", {}),
]
each_number = pytest.mark.parametrize(
    "rule, name, others", NUMBERS, ids=[f"{rule.__name__}-{name}" for rule, name, _ in NUMBERS]
)


@each_number
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_finite_number(rule, name, others, value):
    with pytest.raises(ValueError, match=f"{name} is a finite number, got {value}"):
        rule(**{name: value}, **others)
    with pytest.raises(ValueError, match=f"{name} is a finite number, got {value}"):
        rule_from_dict({"rule": rule.__name__, name: value, **others})


@each_number
@pytest.mark.parametrize("value", ["0.1", None, True, {}])
def test_what_is_no_number(rule, name, others, value):
    with pytest.raises(TypeError, match=f"{name} is a (number|float)"):
        rule(**{name: value}, **others)
    with pytest.raises(ValueError, match=f"{rule.__name__} does not take .*{name} is a (number|float)"):
        rule_from_dict({"rule": rule.__name__, name: value, **others})


@pytest.mark.parametrize("bound", [[0.0, math.nan], torch.tensor([0.0, -math.inf])])
def test_bounds_per_channel_are_finite(bound):
    with pytest.raises(ValueError, match="low is finite, got"):
        ZBoxRule(bound, 1.0)


def test_bounds_that_do_not_fit_each_other():
    with pytest.raises(ValueError, match="low and high of shapes that broadcast"):
        ZBoxRule(torch.zeros(2), torch.ones(3))


def test_other_arguments():
    with pytest.raises(TypeError, match=r"signal is the index of an argument, or None, got 0\.5"):
        SignalTakeAllRule(0.5)
    with pytest.raises(TypeError, match="values_only is True or False, got 'no'"):
        AttentionRule("no")
    with pytest.raises(TypeError, match="zero_params takes names of parameters such as 'bias', got 3"):
        EpsilonRule(zero_params=3)


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("epsilon", {"epsilon": math.nan}),
        ("epsilon_plus", {"stabilizer": math.inf}),
        ("epsilon_gamma_box", {"low": math.nan, "high": 1.0}),
        ("epsilon_gamma_box", {"low": 0.0, "high": 1.0, "gamma": math.nan}),
        ("beta_smooth", {"beta": math.inf}),
        ("lstm_lrp", {"epsilon": math.nan}),
    ],
)
def test_presets_take_what_their_rules_take(name, parameters):
    with pytest.raises(ValueError, match="is a finite number, got"):
        preset(name, **parameters)


MODEL = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2, bias=False))


@pytest.mark.parametrize("names, unknown", [("biases", "biases"), ("Bias", "Bias"), (["bias", "foo"], "foo")])
def test_zero_params_that_name_no_parameter(names, unknown):
    text = f"zero_params names '{unknown}', and no layer .* give one or several of 'bias', 'weight'"
    x = torch.ones(1, 4)
    with pytest.raises(ValueError, match=text):
        LRP(epsilon_plus(zero_params=names), target=Target("output", 0)).wrap(MODEL)(
            TensorDict({"input": x}, [1])
        )
    with pytest.raises(ValueError, match=text):
        EpsilonRule(zero_params=names).register(MODEL[0])
    assert "forward" not in vars(MODEL[0])


def test_zero_params_of_some_of_the_layers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.LSTM(4, 4, batch_first=True), nn.Identity())
    rule = EpsilonRule(zero_params=["bias_ih_l0", "bias"])
    with rule.register(model[0]):
        pass
    with pytest.raises(ValueError, match="'bias_ih_l0'"):
        rule.register(nn.Linear(2, 2))
    composite = [((nn.LSTM, nn.Linear), rule)]
    LRP(composite).plan(nn.ModuleList([model[0], nn.Linear(4, 2)]))
