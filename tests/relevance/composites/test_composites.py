"""Composites: first match wins, plain data, printable, comparable, additive; and the presets, which are such lists."""

from __future__ import annotations

import copy
import json
import pickle
import re
from collections import OrderedDict

import pytest
import tomllib
import torch
from tensordict import TensorDict
from torch import nn

from tdhook import LRP, Composite, preset
from tdhook.models.families import Activation, Convolution, Linear
from tdhook.relevance.composites.composite import PRESETS
from tdhook.relevance.composites.presets import epsilon_gamma_box, epsilon_plus
from tdhook.rules import (
    AlphaBetaRule,
    BaseRuleMapper,
    EpsilonPlus,
    EpsilonRule,
    FlatRule,
    GammaRule,
    IgnoreRule,
    NormRule,
    PassRule,
    ReLUBetaSmoothRule,
    ReLUDeconvNetRule,
    ReLUGuidedBackpropRule,
    RevealCancelRule,
    Rule,
    ShapleyRule,
    StopRule,
    WSquareRule,
    ZBoxRule,
    ZPlusRule,
)
from tdhook.selectors import First, Last, Name, Reads, Type, Where

COMPOSITE = Composite(
    [(Name("head"), WSquareRule()), (nn.Linear, EpsilonRule(0.25)), (Activation, PassRule())]
)


def test_the_first_match_wins():
    linear = nn.Linear(2, 2)
    assert COMPOSITE("head", linear) == WSquareRule()
    assert COMPOSITE("body", linear) == EpsilonRule(0.25)
    assert COMPOSITE("act", nn.Tanh()) == PassRule()
    assert COMPOSITE("other", nn.Embedding(2, 2)) is None
    assert Composite([(nn.Linear, FlatRule())])("head", linear) == FlatRule()
    assert Composite()("head", linear) is None


def test_shorthand():
    def small(name, module):
        return len(name) < 3

    pattern = re.compile("x+")
    composite = Composite(
        [
            (nn.ReLU, PassRule()),
            ((nn.Linear, nn.Conv2d), EpsilonRule()),
            ("layers.*", FlatRule()),
            (pattern, ZPlusRule()),
            (small, IgnoreRule()),
            [Reads("pixels"), ZBoxRule(0.0, 1.0)],
        ]
    )
    assert [selector for selector, _ in composite] == [
        Type(nn.ReLU),
        Type(nn.Linear, nn.Conv2d),
        Name("layers.*"),
        Name(pattern),
        Where(small),
        Reads("pixels"),
    ]


@pytest.mark.parametrize(
    "pairs, text",
    [
        ([nn.Linear], r"a composite is a list of \(selector, rule\) pairs, got"),
        ([(nn.Linear, EpsilonRule(), 3)], r"a composite is a list of \(selector, rule\) pairs, got"),
        ([(nn.Linear, EpsilonRule)], r"write EpsilonRule\(\.\.\.\), not the class"),
        ([(nn.Linear, "epsilon")], r"pairs selectors with rules, got 'epsilon' of type str"),
        ([(nn.Linear, None)], r"pairs selectors with rules, got None"),
        ([(5, EpsilonRule())], "5 of type int selects nothing"),
    ],
    ids=str,
)
def test_what_is_no_composite(pairs, text):
    for make in (Composite, LRP):
        with pytest.raises(TypeError, match=text):
            make(pairs)


@pytest.mark.parametrize(
    "value",
    [EpsilonRule(), epsilon_plus, 5, {"preset": "epsilon_plus"}],
    ids=["rule", "function", "number", "table"],
)
def test_lrp_says_what_it_takes_for_a_composite(value):
    with pytest.raises(TypeError, match=r"composite|preset"):
        LRP(value)


def test_concatenation():
    head, body = [("head", WSquareRule())], [(nn.Linear, EpsilonRule(0.25)), (Activation, PassRule())]
    assert Composite(head) + Composite(body) == COMPOSITE
    assert Composite(head) + body == COMPOSITE
    assert head + Composite(body) == COMPOSITE
    assert len(COMPOSITE) == 3
    assert list(Composite(head) + epsilon_plus())[1:] == list(epsilon_plus())
    with pytest.raises(TypeError):
        COMPOSITE + 5


def test_comparison_hash_copies():
    same = Composite(list(COMPOSITE))
    assert same == COMPOSITE and hash(same) == hash(COMPOSITE)
    assert copy.deepcopy(COMPOSITE) == COMPOSITE and pickle.loads(pickle.dumps(COMPOSITE)) == COMPOSITE
    assert Composite(list(COMPOSITE)[::-1]) != COMPOSITE
    assert Composite([(nn.Linear, EpsilonRule(0.25))]) != Composite([(nn.Linear, EpsilonRule(0.5))])
    assert list(COMPOSITE) != COMPOSITE


def test_it_prints_readably():
    assert repr(COMPOSITE) == (
        "Composite([\n"
        "    (Name('head'), WSquareRule()),\n"
        "    (Type(Linear), EpsilonRule(epsilon=0.25)),\n"
        "    (Type(Activation), PassRule()),\n"
        "])"
    )
    assert repr(Composite()) == "Composite([])"


# --- Plain data -----------------------------------------------------------------------------------

RICH = Composite(
    [
        (Reads(("obs", "pixels")), ZBoxRule(torch.tensor([[[0.0]], [[0.5]]]), 1.0)),
        (First(Type(Convolution) & ~Name("skip.*")), FlatRule(zero_params=["weight", "bias"])),
        (Last(nn.Linear) | Type("*RMSNorm"), GammaRule(0.1, stabilizer=1e-4, zero_params="bias")),
        (Linear, AlphaBetaRule(3.0, 2.0)),
        (re.compile(r"\.\d+$"), ReLUBetaSmoothRule(beta=3.0)),
    ]
)


def through_toml(data):
    """Written by hand, since Python only reads TOML."""

    def text(value):
        if isinstance(value, dict):
            return "{" + ", ".join(f"{json.dumps(k)} = {text(v)}" for k, v in value.items()) + "}"
        if isinstance(value, list):
            return "[" + ", ".join(map(text, value)) + "]"
        return json.dumps(value)

    return tomllib.loads("\n".join(f"{k} = {text(v)}" for k, v in data.items()))


@pytest.mark.parametrize("composite", [COMPOSITE, RICH, Composite()], ids=["short", "rich", "empty"])
@pytest.mark.parametrize("through", [lambda d: json.loads(json.dumps(d)), through_toml], ids=["json", "toml"])
def test_round_trip(composite, through):
    assert Composite.from_dict(through(composite.to_dict())) == composite


@pytest.mark.parametrize("name", PRESETS)
def test_presets_round_trip(name):
    composite = preset(name, **({"low": -1.0, "high": 1.0} if name == "epsilon_gamma_box" else {}))
    assert Composite.from_dict(through_toml(composite.to_dict())) == composite


def test_a_file_as_a_user_writes_it():
    text = """
    preset = "epsilon_gamma_box"
    low = 0.0
    high = 1.0

    [[pairs]]
    select = "head"
    rule = "WSquareRule"

    [[pairs]]
    select = { reads = "pixels" }
    rule = "EpsilonRule"
    epsilon = 0.01
    zero_params = "bias"
    """
    own = [("head", WSquareRule()), (Reads("pixels"), EpsilonRule(0.01, zero_params="bias"))]
    assert Composite.from_dict(tomllib.loads(text)) == own + epsilon_gamma_box(0.0, 1.0)
    assert Composite.from_dict({"preset": "epsilon_plus", "epsilon": 0.5}) == epsilon_plus(epsilon=0.5)


@pytest.mark.parametrize(
    "data, text",
    [
        ({}, "a composite is given by 'pairs', 'preset' or both"),
        ({"rules": []}, "a composite is given by 'pairs', 'preset' or both; got"),
        ({"pairs": [], "epsilon": 1.0}, "a composite is given by 'pairs', 'preset' or both; got"),
        ({"pairs": [{"rule": "EpsilonRule"}]}, "each of 'pairs' has 'select' and 'rule'"),
        ({"pairs": [["head", "EpsilonRule"]]}, "each of 'pairs' has 'select' and 'rule'"),
        ({"pairs": {"select": "head", "rule": "EpsilonRule"}}, "each of 'pairs' has 'select' and 'rule'"),
        ({"pairs": 5}, "pairs"),
        (
            {"pairs": [{"select": "head", "rule": "NoSuchRule"}]},
            "no rule is named 'NoSuchRule'; rules are .*EpsilonRule",
        ),
        ({"pairs": [{"select": "head", "rule": "Rule"}]}, "no rule is named 'Rule'"),
        ({"pairs": [{"select": "head", "rule": 5}]}, "no rule is named 5"),
        ({"pairs": [{"select": "head", "rule": "EpsilonRule", "eps": 1.0}]}, "EpsilonRule does not take"),
        ({"pairs": [{"select": "head", "rule": "ZBoxRule"}]}, "ZBoxRule does not take"),
        ({"pairs": [{"select": "head", "rule": "EpsilonRule", "epsilon": "small"}]}, "epsilon|EpsilonRule"),
        (
            {"preset": "epsilon_minus"},
            "no preset is named 'epsilon_minus'; presets are epsilon, epsilon_plus, ",
        ),
        ({"preset": "epsilon_plus", "low": 0.0}, "preset 'epsilon_plus': .*low"),
        ({"preset": "epsilon_gamma_box"}, "preset 'epsilon_gamma_box': .*low"),
    ],
    ids=str,
)
def test_data_that_is_no_composite(data, text):
    with pytest.raises(ValueError, match=text):
        Composite.from_dict(data)


def test_callables_are_not_data():
    for pair in (
        (Where(lambda name, module: True), EpsilonRule()),
        (nn.Linear, EpsilonRule(epsilon=lambda z: z)),
    ):
        with pytest.raises(TypeError, match="callable, which cannot be written as plain data"):
            Composite([pair]).to_dict()


def test_a_users_rule_is_found_by_name():
    class Doubling(Rule):
        def __init__(self, factor=2.0):
            super().__init__()
            self.factor = factor

        @staticmethod
        def forward(ctx, apply_kwargs, module, model_kwargs, *inputs):
            return module._prev_forward(*inputs, **model_kwargs)

        @staticmethod
        def backward(ctx, *out_relevance):
            return None, None, None, *out_relevance

    composite = Composite([("head", Doubling(3.0))])
    assert composite.to_dict() == {"pairs": [{"select": {"name": "head"}, "rule": "Doubling", "factor": 3.0}]}
    assert Composite.from_dict(composite.to_dict()) == composite


# --- Presets --------------------------------------------------------------------------------------

FIRST_RULES = {  # of a network that starts with a convolution: the first and second convolution, linear, ReLU
    "epsilon": [EpsilonRule(), EpsilonRule(), EpsilonRule(), PassRule()],
    "deeplift": [EpsilonRule(0.0)] * 3 + [PassRule()],
    "deeplift_reveal_cancel": [RevealCancelRule()] * 3 + [PassRule()],
    "deeplift_shapley": [ShapleyRule()] * 3 + [PassRule()],
    "epsilon_plus": [ZPlusRule(), ZPlusRule(), EpsilonRule(), PassRule()],
    "epsilon_plus_flat": [FlatRule(), ZPlusRule(), EpsilonRule(), PassRule()],
    "epsilon_alpha2_beta1": [AlphaBetaRule(2.0, 1.0)] * 2 + [EpsilonRule(), PassRule()],
    "epsilon_alpha2_beta1_flat": [FlatRule(), AlphaBetaRule(2.0, 1.0), EpsilonRule(), PassRule()],
    "epsilon_gamma_box": [ZBoxRule(0.0, 1.0), GammaRule(0.25), EpsilonRule(), PassRule()],
    "guided_backprop": [None, None, None, ReLUGuidedBackpropRule()],
    "deconvnet": [None, None, None, ReLUDeconvNetRule()],
    "excitation_backprop": [ZPlusRule(), ZPlusRule(), ZPlusRule(), PassRule()],
    "beta_smooth": [None, None, None, ReLUBetaSmoothRule(10.0)],
    "attn_lrp": [None, None, None, PassRule()],
    "cp_lrp": [None, None, None, PassRule()],
    "lstm_lrp": [EpsilonRule(1e-3), EpsilonRule(1e-3), EpsilonRule(1e-3), PassRule()],
    "relp": [None, None, None, None],
}


def network():
    return nn.Sequential(
        nn.Conv2d(1, 2, 3),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Conv2d(2, 2, 2),
        nn.ReLU(),
        nn.Flatten(-3),
        nn.Linear(8, 3),
    )


def test_all_presets_are_there():
    assert set(PRESETS) == set(FIRST_RULES)


@pytest.mark.parametrize("name", FIRST_RULES)
def test_presets_by_name(name):
    parameters = {"low": 0.0, "high": 1.0} if name == "epsilon_gamma_box" else {}
    composite = preset(name, **parameters)
    assert composite == PRESETS[name](**parameters)
    model, td = network(), TensorDict(input=torch.rand(2, 1, 8, 8), batch_size=[2])
    baseline = 0.0 if name.startswith("deeplift") else None
    plan = LRP(composite, baseline=baseline).plan
    rules = {row.path: row.rule for row in plan(model, td) if row.operation is None}
    assert [rules.get(path) for path in ("0", "3", "6", "1")] == FIRST_RULES[name]
    if "2" in rules:
        listed = {row.path: row.rule for row in plan(model)}
        assert rules["2"] == NormRule(1e-6 if baseline is None else 0.0) and listed["5"] == IgnoreRule()
    with LRP(composite if parameters else name, baseline=baseline).prepare(model) as explained:
        td = explained(td)
    assert td["attr", "input"].shape == (2, 1, 8, 8) and td["attr", "input"].isfinite().all()


def test_presets_say_what_is_wrong():
    with pytest.raises(
        ValueError, match="no preset is named 'nope'; presets are epsilon, epsilon_plus, epsilon_plus_flat"
    ):
        LRP("nope")
    with pytest.raises(ValueError, match=r"preset 'epsilon_gamma_box': .*'low' and 'high'"):
        LRP("epsilon_gamma_box")
    with pytest.raises(ValueError, match=r"preset 'deconvnet': .*epsilon"):
        preset("deconvnet", epsilon=1.0)


def test_presets_take_parameters():
    composite = preset("epsilon_plus", epsilon=0.5, stabilizer=0.25, zero_params="bias")
    assert composite("c", nn.Conv2d(1, 1, 1)) == ZPlusRule(0.25, zero_params="bias")
    assert composite("l", nn.Linear(1, 1)) == EpsilonRule(0.5, zero_params="bias")
    assert composite("p", nn.AvgPool2d(1)) == NormRule(0.25)


# --- The seed's mappers are composites ------------------------------------------------------------


def test_the_seeds_mappers_are_composites():
    assert isinstance(EpsilonPlus(), Composite) and isinstance(BaseRuleMapper(), Composite)
    assert list(EpsilonPlus(0.5, 0.25)) == list(epsilon_plus(0.5, 0.25))
    extended = [("head", WSquareRule())] + EpsilonPlus()  # noqa: RUF005
    assert (
        extended("head", nn.Linear(1, 1)) == WSquareRule()
        and extended("body", nn.Linear(1, 1)) == EpsilonRule()
    )
    model, td = network(), TensorDict(input=torch.rand(2, 1, 8, 8), batch_size=[2])
    results = []
    for method in (LRP(EpsilonPlus()), LRP("epsilon_plus")):
        with method.prepare(model) as explained:
            results.append(explained(td.clone())["attr", "input"])
    assert torch.equal(*results)


def mine(name, module):
    return FlatRule() if name == "head" else None


def test_a_users_mapper_stays_with_the_composite():
    mapper, linear = EpsilonPlus(rule_mapper=mine), nn.Linear(1, 1)
    before, after = [("body", StopRule())] + mapper, mapper + [("body", StopRule())]  # noqa: RUF005
    for composite in (mapper, before, after):
        assert composite("head", linear) == FlatRule()
        assert composite("other", linear) == EpsilonRule()
    assert mapper != EpsilonPlus()
    with pytest.raises(TypeError, match="callable"):
        mapper.to_dict()


class Stopping(EpsilonPlus):
    """As mappers were written for tdhook 0.3."""

    def _call(self, name, module):
        return StopRule() if name == "head" else super()._call(name, module)


class StoppingByCall(Composite):
    def __call__(self, name, module):
        return StopRule() if name == "head" else super().__call__(name, module)


@pytest.mark.parametrize(
    "mapper",
    [Stopping(), StoppingByCall(epsilon_plus()), Stopping(rule_mapper=lambda name, module: None)],
    ids=["_call", "__call__", "asked first"],
)
def test_a_subclass_that_decides_itself_is_honoured(mapper):
    model = nn.Sequential(OrderedDict(body=nn.Linear(3, 3), head=nn.Linear(3, 2)))
    td = TensorDict(input=torch.rand(2, 3), batch_size=[2])
    others = mapper + [("nothing", FlatRule())]  # noqa: RUF005
    by_mapper = LRP(rule_mapper=mapper, warn_on_missing_rule=False)
    for method in (LRP(mapper), by_mapper, LRP(others)):
        rules = {row.path: row.rule for row in method.plan(model)}
        assert rules["head"] == StopRule() and rules["body"] == EpsilonRule()
        with method.prepare(model) as explained:
            assert not explained(td.clone())["attr", "input"].any()


def test_a_users_mapper_comes_before_what_a_subclass_decides():
    mapper = Stopping(rule_mapper=mine)
    assert mapper("head", nn.Linear(1, 1)) == FlatRule()
    assert LRP(mapper).plan(nn.Sequential(OrderedDict(head=nn.Linear(3, 2)))).rows[-1].rule == FlatRule()
