"""The names that code written for tdhook 0.3 imports: their signatures, what they do, and what they say."""

from __future__ import annotations

import abc
import gc
import inspect
import weakref

import pytest
import torch
from torch import nn
from torch.autograd.function import Function, FunctionMeta

from tdhook.attribution.lrp_helpers import rules, types
from tdhook.attribution.lrp_helpers.layers import Sum
from tdhook.attribution.lrp_helpers.rules import (
    AbstractFunctionMeta,
    AlphaBetaRule,
    BaseRuleMapper,
    EpsilonPlus,
    EpsilonRule,
    FlatRule,
    IgnoreRule,
    NormRule,
    ParamModifier,
    PassRule,
    RemovableRuleHandle,
    Rule,
    StopRule,
    raise_for_unconserved_rel_factory,
    stabilize,
)

SIGNATURES = {
    "stabilize": {"tensor": inspect.Parameter.empty, "epsilon": 1e-6},
    "ParamModifier": {"modify_fn": None, "select_fn": None},
    "RemovableRuleHandle": {"rule": inspect.Parameter.empty, "module": inspect.Parameter.empty},
    "BaseRuleMapper": {"stabilizer": 1e-6, "rule_mapper": None},
    "EpsilonPlus": {"epsilon": 1e-6, "stabilizer": 1e-6, "rule_mapper": None},
    "raise_for_unconserved_rel_factory": {"atol": 1e-6, "rtol": 1e-6},
    "EpsilonRule": {"epsilon": 1e-6},
    "UniformEpsilonRule": {"epsilon": 1e-6},
    "PassRule": {},
    "IgnoreRule": {},
    "WSquareRule": {"stabilizer": 1e-6},
    "FlatRule": {"stabilizer": 1e-6},
    "UniformRule": {},
    "StopRule": {},
    "AlphaBetaRule": {"alpha": 2.0, "beta": 1.0, "stabilizer": 1e-6},
    "SoftmaxEpsilonRule": {"epsilon": 1e-6},
    "LayerNormRule": {},
    "PseudoIdentityRule": {"stabilizer": 1e-6},
    "AHQKVRule": {},
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_arguments_come_in_the_seeds_order_with_its_defaults(name):
    parameters = inspect.signature(getattr(rules, name)).parameters
    expected = SIGNATURES[name]
    assert list(parameters)[: len(expected)] == list(expected)
    assert {k: parameters[k].default for k in expected} == expected
    assert all(p.default is not inspect.Parameter.empty for k, p in parameters.items() if k not in expected)


def test_everything_that_is_promised_can_be_imported_with_a_star():
    assert set(SIGNATURES) | {"Rule", "AbstractFunctionMeta"} <= set(rules.__all__)
    names: dict[str, object] = {}
    exec("from tdhook.attribution.lrp_helpers.rules import *", names)  # noqa: S102
    assert set(SIGNATURES) <= names.keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_stabilize_moves_away_from_zero_and_zero_is_positive(dtype):
    z = torch.tensor([2.0, -2.0, 0.0, -0.0], dtype=dtype)
    stable = stabilize(z, 0.5)
    assert stable.dtype == dtype
    assert stable.tolist() == [2.5, -2.5, 0.5, 0.5]


def test_stabilize_has_a_default_and_takes_a_callable():
    assert stabilize(torch.zeros(1)).item() == pytest.approx(1e-6)
    assert stabilize(torch.tensor([3.0]), lambda z: z.clamp(min=7.0)).item() == 7.0


def test_param_modifier_changes_nothing_by_default():
    layer = nn.Linear(2, 3)
    x = torch.randn(4, 2)
    before = layer(x)
    with ParamModifier()(layer) as same:
        assert same is layer
        assert torch.equal(layer(x), before)
    with ParamModifier(modify_fn=lambda name, p: p * 0)(layer):
        assert torch.equal(layer(x), before), "nothing is selected by default"


@pytest.mark.parametrize("failing", [False, True])
def test_param_modifier_puts_the_very_same_parameters_back(failing):
    layer = nn.Linear(2, 3)
    own, values = dict(layer.named_parameters()), {k: v.clone() for k, v in layer.state_dict().items()}
    x = torch.randn(4, 2)
    modifier = ParamModifier(lambda name, p: torch.zeros_like(p), lambda name, p: name == "bias")
    try:
        with modifier(layer):
            assert torch.equal(layer(x), x @ layer.weight.T)
            if failing:
                raise ZeroDivisionError
    except ZeroDivisionError:
        assert failing
    assert all(p is own[name] for name, p in layer.named_parameters())
    assert all(torch.equal(v, values[k]) for k, v in layer.state_dict().items())
    assert all(isinstance(p, nn.Parameter) and p.requires_grad for p in layer.parameters())


def test_param_modifier_restores_when_the_modification_itself_fails():
    layer = nn.Linear(2, 3)
    own = dict(layer.named_parameters())

    def modify(name, p):
        if name == "bias":
            raise ZeroDivisionError
        return p * 0

    with pytest.raises(ZeroDivisionError), ParamModifier(modify, ParamModifier.select_all)(layer):
        pass
    assert all(p is own[name] for name, p in layer.named_parameters())


def test_param_modifiers_chain_in_order():
    layer = nn.Linear(2, 3)
    plus = ParamModifier(lambda name, p: p + 1, ParamModifier.select_all)
    twice = ParamModifier(lambda name, p: 2 * p, lambda name, p: name == "weight")
    weight, bias = layer.weight.clone(), layer.bias.clone()
    with ParamModifier.from_modifiers([plus, twice])(layer):
        assert torch.equal(layer.weight, 2 * (weight + 1)) and torch.equal(layer.bias, bias + 1)
    with ParamModifier.from_modifiers([twice, plus])(layer):
        assert torch.equal(layer.weight, 2 * weight + 1)


def test_the_metaclass_is_that_of_abstract_functions():
    assert issubclass(AbstractFunctionMeta, abc.ABCMeta) and issubclass(AbstractFunctionMeta, FunctionMeta)
    assert type(Rule) is AbstractFunctionMeta and issubclass(Rule, Function)
    assert inspect.isabstract(Rule) and not inspect.isabstract(EpsilonRule)


def test_register_and_unregister():
    layer, x = nn.Linear(3, 2), torch.randn(4, 3)
    forward, attributes, plain = layer.forward, dict(vars(layer)), layer(x)
    rule = EpsilonRule()
    handle = rule.register(layer)
    assert isinstance(handle, RemovableRuleHandle)
    assert torch.equal(layer(x.clone().requires_grad_()), plain)
    rule.unregister(layer)
    assert layer.forward == forward and vars(layer).keys() == attributes.keys()


def test_a_handle_is_idempotent_and_a_context_manager():
    layer = nn.Linear(3, 2)
    forward = layer.forward
    handle = EpsilonRule().register(layer)
    handle.remove()
    handle.remove()
    assert layer.forward == forward
    with StopRule().register(layer) as entered:
        assert isinstance(entered, RemovableRuleHandle)
        assert layer.forward != forward
    assert layer.forward == forward
    entered.remove()
    with pytest.raises(ZeroDivisionError), PassRule().register(layer):
        raise ZeroDivisionError
    assert layer.forward == forward


def test_a_stale_handle_leaves_the_next_rule_alone():
    layer = nn.Linear(3, 2)
    stale = EpsilonRule().register(layer)
    stale.remove()
    rule = EpsilonRule()
    with rule.register(layer):
        stale.remove()
        x = torch.randn(3, requires_grad=True)
        (r,) = torch.autograd.grad(layer(x).sum(), x)
        assert not torch.equal(r, layer.weight.sum(0)), "the second rule is still on"


def test_a_handle_keeps_no_module_alive():
    layer = nn.Linear(3, 2)
    alive = weakref.ref(layer)
    handle = EpsilonRule().register(layer)
    del layer
    gc.collect()
    assert alive() is None
    handle.remove()


def test_an_attribute_of_the_users_named_forward_comes_back():
    layer = nn.Linear(3, 2)
    own = layer.forward = lambda x: torch.nn.functional.linear(x, 2 * layer.weight)
    x = torch.randn(4, 3)
    with EpsilonRule().register(layer):
        assert torch.equal(layer(x), x @ (2 * layer.weight).T)
    assert layer.forward is own and "_prev_forward" not in vars(layer)


MAPPED = [
    *((m, PassRule) for m in (nn.ReLU(), nn.GELU(), nn.Tanh(), nn.SiLU(), nn.LeakyReLU(), nn.BatchNorm1d(2))),
    *(
        (m, IgnoreRule)
        for m in (nn.MaxPool2d(2), nn.AdaptiveMaxPool1d(1), nn.Identity(), nn.Dropout(), nn.Flatten())
    ),
    *((m, NormRule) for m in (Sum(), nn.AvgPool1d(2), nn.AdaptiveAvgPool2d(1))),
    *((m, None) for m in (nn.Softmax(-1), nn.LayerNorm(2), nn.Sequential(), nn.Embedding(2, 2))),
]


@pytest.mark.parametrize("module, rule", MAPPED, ids=lambda x: getattr(x, "__name__", type(x).__name__))
def test_what_the_mappers_say(module, rule):
    for mapper in (BaseRuleMapper(), EpsilonPlus()):
        found = mapper("path", module)
        assert found is None if rule is None else isinstance(found, rule)
    if rule is NormRule:
        assert BaseRuleMapper(stabilizer=0.25)("path", module).stabilizer == 0.25


def test_epsilon_plus_adds_the_linear_layers_and_asks_the_user_first():
    mapper = EpsilonPlus(epsilon=0.5, stabilizer=0.25)
    assert isinstance(mapper, BaseRuleMapper)
    assert BaseRuleMapper()("fc", nn.Linear(2, 2)) is None
    assert mapper("fc", nn.Linear(2, 2)) == EpsilonRule(0.5)
    for conv in (nn.Conv1d(1, 1, 1), nn.ConvTranspose2d(1, 1, 1)):
        rule = mapper("conv", conv)
        assert isinstance(rule, AlphaBetaRule) and (rule.alpha, rule.beta, rule.stabilizer) == (
            1.0,
            0.0,
            0.25,
        )
    asked = []

    def mine(name, module):
        asked.append((name, module))
        return FlatRule() if name == "first" else None

    layer = nn.Linear(2, 2)
    for mapper in (BaseRuleMapper(rule_mapper=mine), EpsilonPlus(rule_mapper=mine)):
        assert isinstance(mapper("first", layer), FlatRule)
        assert isinstance(mapper("second", nn.ReLU()), PassRule)
    assert asked[0] == ("first", layer) and len(asked) == 4


def test_families():
    conv, transposed, dense = nn.Conv2d(1, 1, 1), nn.ConvTranspose3d(1, 1, 1), nn.Linear(1, 1)
    assert isinstance(conv, types.ConvolutionStandard) and not isinstance(conv, types.ConvolutionTranspose)
    assert isinstance(transposed, types.ConvolutionTranspose) and not isinstance(
        transposed, types.ConvolutionStandard
    )
    assert all(isinstance(m, types.Convolution) for m in (conv, transposed)) and not isinstance(
        dense, types.Convolution
    )
    assert all(isinstance(m, types.Linear) for m in (conv, transposed, dense)) and not isinstance(
        nn.ReLU(), types.Linear
    )
    assert isinstance(nn.SiLU(), types.Activation) and not isinstance(dense, types.Activation)
    assert isinstance(nn.AvgPool2d(1), types.AvgPool) and isinstance(nn.MaxPool3d(1), types.MaxPool)
    assert isinstance(nn.BatchNorm3d(1), types.BatchNorm) and not isinstance(nn.LayerNorm(1), types.BatchNorm)

    class Mine(nn.Linear): ...

    assert isinstance(Mine(1, 1), types.Linear) and issubclass(Mine, types.Linear)


def test_sum_is_a_module():
    x = torch.randn(2, 3, 4)
    assert Sum().dim == -1
    assert torch.equal(Sum()(x), x.sum(-1)) and torch.equal(Sum(dim=1)(x), x.sum(1))


def test_the_conservation_hook():
    hook = raise_for_unconserved_rel_factory()
    one, two = torch.ones(2), torch.full((2,), 2.0)
    hook(nn.ReLU(), two, (one, one))
    hook(nn.ReLU(), (one, None, one), (two,))
    for given in ((one, two), ((one,), two), (one, (two, one))):
        with pytest.raises(RuntimeError, match=r"^Unconserved relevance"):
            hook(nn.ReLU(), *given)
    raise_for_unconserved_rel_factory(atol=5.0)(nn.ReLU(), one, two)

    x = torch.rand(3, 4, requires_grad=True)
    for rule, conserves in ((EpsilonRule(1e-12), True), (StopRule(), False)):
        layer = nn.Linear(4, 2, bias=False)
        layer.register_full_backward_hook(raise_for_unconserved_rel_factory(atol=1e-4))
        with rule.register(layer):
            z = layer(x)
            if conserves:
                z.backward(z.detach())
            else:
                with pytest.raises(RuntimeError, match="Unconserved relevance"):
                    z.backward(z.detach())
