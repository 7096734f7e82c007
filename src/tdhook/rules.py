"""The rules of layer-wise relevance propagation, each from its definition.

Registered alone on a module, a rule makes ``module(x).backward(R)`` leave the relevance of the input in ``x.grad``.
"""

from __future__ import annotations

from tdhook.relevance.composites.mappers import BaseRuleMapper, EpsilonPlus
from tdhook.relevance.propagation.formula import PropagationRule
from tdhook.relevance.propagation.params import ParamModifier
from tdhook.relevance.propagation.rule import AbstractFunctionMeta, RemovableRuleHandle, Rule
from tdhook.relevance.propagation.stabilisers import stabilize
from tdhook.relevance.propagation.steps import Grads, Step
from tdhook.relevance.rules.attention import AttentionRule
from tdhook.relevance.rules.checks import raise_for_unconserved_rel_factory
from tdhook.relevance.rules.epsilon import EpsilonRule, NormRule, SoftmaxEpsilonRule, UniformEpsilonRule
from tdhook.relevance.rules.gradient import (
    AHQKVRule,
    PseudoIdentityRule,
    ReLUBetaSmoothRule,
    ReLUDeconvNetRule,
    ReLUGuidedBackpropRule,
)
from tdhook.relevance.rules.normalisation import LayerNormRule
from tdhook.relevance.rules.products import ConstantRule, FactorsRule, SignalTakeAllRule
from tdhook.relevance.rules.recurrent import RecurrentRule
from tdhook.relevance.rules.reveal import RevealCancelRule, ShapleyRule
from tdhook.relevance.rules.signed import AlphaBetaRule, GammaRule, ZBoxRule, ZPlusRule
from tdhook.relevance.rules.simple import IgnoreRule, PassRule, StopRule, UniformRule
from tdhook.relevance.rules.squares import FlatRule, WSquareRule

__all__ = [
    "AHQKVRule",
    "AbstractFunctionMeta",
    "AlphaBetaRule",
    "AttentionRule",
    "BaseRuleMapper",
    "ConstantRule",
    "EpsilonPlus",
    "EpsilonRule",
    "FactorsRule",
    "FlatRule",
    "GammaRule",
    "Grads",
    "IgnoreRule",
    "LayerNormRule",
    "NormRule",
    "ParamModifier",
    "PassRule",
    "PropagationRule",
    "PseudoIdentityRule",
    "ReLUBetaSmoothRule",
    "ReLUDeconvNetRule",
    "ReLUGuidedBackpropRule",
    "RecurrentRule",
    "RemovableRuleHandle",
    "RevealCancelRule",
    "Rule",
    "ShapleyRule",
    "SignalTakeAllRule",
    "SoftmaxEpsilonRule",
    "Step",
    "StopRule",
    "UniformEpsilonRule",
    "UniformRule",
    "WSquareRule",
    "ZBoxRule",
    "ZPlusRule",
    "raise_for_unconserved_rel_factory",
    "stabilize",
]
