"""The rules of layer-wise relevance propagation, each from its definition.

Registered alone on a module, a rule makes ``module(x).backward(R)`` leave the relevance of the input in ``x.grad``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tdhook.attribution.lrp_helpers.params import ParamModifier, stabilize
from tdhook.attribution.lrp_helpers.rule import AbstractFunctionMeta, RemovableRuleHandle, Rule
from tdhook.attribution.lrp_helpers.rules.attention import AttentionRule
from tdhook.attribution.lrp_helpers.rules.checks import raise_for_unconserved_rel_factory
from tdhook.attribution.lrp_helpers.rules.epsilon import (
    EpsilonRule,
    NormRule,
    SoftmaxEpsilonRule,
    UniformEpsilonRule,
)
from tdhook.attribution.lrp_helpers.rules.gradient import (
    AHQKVRule,
    PseudoIdentityRule,
    ReLUBetaSmoothRule,
    ReLUDeconvNetRule,
    ReLUGuidedBackpropRule,
)
from tdhook.attribution.lrp_helpers.rules.normalisation import LayerNormRule
from tdhook.attribution.lrp_helpers.rules.products import ConstantRule, SignalTakeAllRule
from tdhook.attribution.lrp_helpers.rules.recurrent import RecurrentRule
from tdhook.attribution.lrp_helpers.rules.signed import AlphaBetaRule, GammaRule, ZBoxRule, ZPlusRule
from tdhook.attribution.lrp_helpers.rules.simple import IgnoreRule, PassRule, StopRule, UniformRule
from tdhook.attribution.lrp_helpers.rules.squares import FlatRule, WSquareRule

if TYPE_CHECKING:
    from tdhook.composites import BaseRuleMapper, EpsilonPlus

__all__ = [
    "AHQKVRule",
    "AbstractFunctionMeta",
    "AlphaBetaRule",
    "AttentionRule",
    "BaseRuleMapper",
    "ConstantRule",
    "EpsilonPlus",
    "EpsilonRule",
    "FlatRule",
    "GammaRule",
    "IgnoreRule",
    "LayerNormRule",
    "NormRule",
    "ParamModifier",
    "PassRule",
    "PseudoIdentityRule",
    "ReLUBetaSmoothRule",
    "ReLUDeconvNetRule",
    "ReLUGuidedBackpropRule",
    "RecurrentRule",
    "RemovableRuleHandle",
    "Rule",
    "SignalTakeAllRule",
    "SoftmaxEpsilonRule",
    "StopRule",
    "UniformEpsilonRule",
    "UniformRule",
    "WSquareRule",
    "ZBoxRule",
    "ZPlusRule",
    "raise_for_unconserved_rel_factory",
    "stabilize",
]


def __getattr__(name: str) -> Any:
    # The two mappers are composites, which are made of rules: importing them here outright would go in a circle.
    if name in ("BaseRuleMapper", "EpsilonPlus"):
        import tdhook.composites

        return getattr(tdhook.composites, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
