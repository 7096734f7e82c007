"""The rules of linear layers with their references, and how one is tried on a layer."""

from __future__ import annotations

import pytest

from tdhook.rules import (
    AlphaBetaRule,
    EpsilonRule,
    FlatRule,
    GammaRule,
    UniformEpsilonRule,
    WSquareRule,
    ZBoxRule,
    ZPlusRule,
)

from . import reference
from .checks import assert_close, registered_relevance
from .layers import CASES, SMALL

# name: (the rule, the reference's name, the reference's parameters)
RULES = {
    "epsilon": (EpsilonRule(), "epsilon", {}),
    "epsilon_large": (EpsilonRule(0.5), "epsilon", {"stab": 0.5}),
    "epsilon_no_bias": (EpsilonRule(zero_params="bias"), "epsilon", {"zero_params": ("bias",)}),
    "uniform_epsilon": (UniformEpsilonRule(1e-3), "epsilon", {"stab": 1e-3}),
    "gamma": (GammaRule(), "gamma", {}),
    "gamma_large": (GammaRule(3.0, stabilizer=0.1), "gamma", {"gamma": 3.0, "stab": 0.1}),
    "gamma_no_bias": (GammaRule(zero_params=["bias"]), "gamma", {"zero_params": ("bias",)}),
    "alpha2_beta1": (AlphaBetaRule(), "alpha_beta", {}),
    "alpha1_beta0": (AlphaBetaRule(1.0, 0.0), "alpha_beta", {"alpha": 1.0, "beta": 0.0}),
    "alpha_beta_stabilised": (
        AlphaBetaRule(1.5, 0.5, stabilizer=0.2),
        "alpha_beta",
        {"alpha": 1.5, "beta": 0.5, "stab": 0.2},
    ),
    "alpha2_beta1_no_bias": (AlphaBetaRule(zero_params=("bias",)), "alpha_beta", {"zero_params": ("bias",)}),
    "zplus": (ZPlusRule(), "zplus", {}),
    "zplus_no_bias": (ZPlusRule(1e-2, zero_params="bias"), "zplus", {"stab": 1e-2, "zero_params": ("bias",)}),
    "zbox": (ZBoxRule(-3.0, 3.0), "zbox", {"low": -3.0, "high": 3.0}),
    "zbox_from_zero": (ZBoxRule(0.0, 4.0, stabilizer=0.1), "zbox", {"low": 0.0, "high": 4.0, "stab": 0.1}),
    "zbox_no_bias": (
        ZBoxRule(-3.0, 2.0, zero_params="bias"),
        "zbox",
        {"low": -3.0, "high": 2.0, "zero_params": ("bias",)},
    ),
    "wsquare": (WSquareRule(), "wsquare", {}),
    "wsquare_no_bias": (
        WSquareRule(0.1, zero_params="bias"),
        "wsquare",
        {"stab": 0.1, "zero_params": ("bias",)},
    ),
    "flat": (FlatRule(), "flat", {}),
    "flat_stabilised": (FlatRule(0.5, zero_params="bias"), "flat", {"stab": 0.5, "zero_params": ("bias",)}),
}

every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
every_layer = pytest.mark.parametrize("case", CASES, ids=str)
some_layers = pytest.mark.parametrize("case", SMALL, ids=str)


def check(case, rule, name, parameters, x, r):
    (actual,) = registered_relevance(rule, case.layer, [x], r)
    assert_close(actual, reference.relevance(name, case.explicit, x, r, **parameters))
