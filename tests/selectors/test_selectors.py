"""Selectors: which module of which model they mean, how they print, compare and travel as plain data."""

from __future__ import annotations

import copy
import json
import pickle
import re
import sys

import pytest
import tomllib
import torch
from tensordict import LazyStackedTensorDict, TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn

from tdhook import LRP
from tdhook.models.families import Activation, Convolution, Linear
from tdhook.rules import EpsilonRule, FlatRule, ZPlusRule
from tdhook.selectors import First, Last, Name, Reads, Selector, Type, Where, Writes, as_selector


class ToyRMSNorm(nn.Module):
    """Stands for a class of another library that must not be imported."""

    def __init__(self, n=4):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n))

    def forward(self, x):
        return x * self.weight


class SpecialNorm(ToyRMSNorm): ...


class Backwards(nn.Module):
    """Registers its layers in the opposite order of that in which it runs them."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 2)
        self.act = nn.ReLU()
        self.stem = nn.Linear(3, 4)

    def forward(self, x):
        return self.head(self.act(self.stem(x)))


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.layers = nn.ModuleList(
            [nn.Sequential(nn.Linear(4, 4), nn.ReLU(), ToyRMSNorm()) for _ in range(2)]
        )
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


MARK = EpsilonRule(0.125)


def selected(selector, model, td=None):
    """Paths of the modules that get the rule of a composite's only pair."""
    if td is None:
        td = TensorDict(input=torch.randn(2, next(model.parameters()).shape[-1]), batch_size=[2])
    found = [row.path for row in LRP([(selector, MARK)]).plan(model, td) if row.rule == MARK]
    return list(dict.fromkeys(found))  # a module that runs twice has two rows


LINEARS = ["stem", "layers.0.0", "layers.1.0", "head"]


@pytest.mark.parametrize(
    "selector, expected",
    [
        (Type(nn.Linear), LINEARS),
        (nn.Linear, LINEARS),
        ((nn.Linear, nn.ReLU), ["stem", "layers.0.0", "layers.0.1", "layers.1.0", "layers.1.1", "head"]),
        (Type(Linear), LINEARS),
        (Activation, ["layers.0.1", "layers.1.1"]),
        (Type("*RMSNorm"), ["layers.0.2", "layers.1.2"]),
        (Type("Toy*", nn.ReLU) & Name("layers.0.*"), ["layers.0.1", "layers.0.2"]),
        (Name("head"), ["head"]),
        ("layers.*.0", ["layers.0.0", "layers.1.0"]),
        (Name("*.0"), ["layers.0", "layers.1.0"]),
        (re.compile(r"^layers\.\d\.0$"), ["layers.0.0", "layers.1.0"]),
        (Name(re.compile("HEAD", re.IGNORECASE)), ["head"]),
        (Where(lambda name, module: name.endswith("1")), ["layers.0.1", "layers.1"]),
        (Where(lambda module: isinstance(module, nn.ReLU)), ["layers.0.1", "layers.1.1"]),
        (lambda name, module: name == "stem", ["stem"]),
        (Type(nn.Linear) & ~Name("head*"), LINEARS[:-1]),
        (~Type(nn.Linear), ["layers.0.1", "layers.0.2", "layers.1.1", "layers.1.2"]),
        (~Type(nn.Linear) & ~Type(nn.ReLU), ["layers.0.2", "layers.1.2"]),
        (~(Type(nn.Linear) | Type("*RMSNorm")), ["layers.0.1", "layers.1.1"]),
        (Type(nn.Linear) & Name("layers.*") | Name("head"), ["layers.0.0", "layers.1.0", "head"]),
        (First(nn.Linear), ["stem"]),
        (Last(Type(nn.Linear)), ["head"]),
        (First(nn.Linear) | Last(nn.Linear), ["stem", "head"]),
        (First(Type(nn.Linear) & Name("layers.*")), ["layers.0.0"]),
        (Last("layers.*.0"), ["layers.1.0"]),
        (Type(nn.Linear) & ~First(nn.Linear) & ~Last(nn.Linear), LINEARS[1:-1]),
    ],
    ids=lambda value: re.sub(r" at 0x\w+", "", str(value)),
)
def test_what_is_selected(selector, expected):
    assert selected(selector, Blocks()) == expected


def test_a_pattern_matches_base_classes_and_the_defining_module():
    model = nn.Sequential(SpecialNorm(), nn.Linear(4, 2))
    assert selected(Type("*RMSNorm"), model) == ["0"]
    assert selected(Type(f"{__name__}.Special*"), model) == ["0"]
    assert selected(Type("torch.nn.*Linear"), model) == ["1"]


def test_first_and_last_follow_execution_not_registration():
    td = TensorDict(input=torch.randn(2, 3), batch_size=[2])
    assert selected(First(nn.Linear), Backwards(), td) == ["stem"]
    assert selected(Last(nn.Linear), Backwards(), td) == ["head"]
    model = Backwards()
    with LRP([(First(nn.Linear), FlatRule()), (Linear, ZPlusRule())]).prepare(model) as explained:
        attr = explained(td)["attr", "input"]
    torch.testing.assert_close(attr, attr[:, :1].expand_as(attr), msg="flat: the same for all inputs")


def test_a_layer_that_runs_first_and_last():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), nn.Linear(4, 4), shared)
    assert selected(First(nn.Linear), model) == ["0"]
    assert selected(Last(nn.Linear), model) == ["0"]


# --- Keys -----------------------------------------------------------------------------------------


def modalities():
    """Pixels and a vector, each through its own encoder, under nested keys, into one head."""
    vision = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 3), nn.Flatten(-3))
    return TensorDictSequential(
        TensorDictModule(vision, [("obs", "pixels")], [("hidden", "seen")]),
        TensorDictModule(
            nn.Sequential(nn.Linear(3, 4), nn.Tanh()), [("obs", "vector")], [("hidden", "felt")]
        ),
        TensorDictModule(
            lambda a, b: torch.cat([a, b], -1), [("hidden", "seen"), ("hidden", "felt")], ["both"]
        ),
        TensorDictModule(
            nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)), ["both"], ["action_value"]
        ),
    )


def observation(*batch):
    return TensorDict(
        obs={"pixels": torch.rand(*batch, 1, 5, 5), "vector": torch.randn(*batch, 3)}, batch_size=batch
    )


@pytest.mark.parametrize(
    "selector, expected",
    [
        (Reads(("obs", "pixels")), ["0.module.0"]),
        (Reads(("obs", "vector")), ["1.module.0"]),
        (Reads("both"), ["3.module.0"]),
        (Writes("action_value"), ["3.module.2"]),
        (Writes(("hidden", "seen")), ["0.module.2"]),
        (Reads(("obs", "vector")) | Reads("both"), ["1.module.0", "3.module.0"]),
        (Type(nn.Linear) & ~Reads("both"), ["1.module.0", "3.module.2"]),
        (First(Reads("both") | Reads(("obs", "vector"))), ["1.module.0"]),
        (Last(Type(nn.Linear) & ~Writes("action_value")), ["3.module.0"]),
    ],
    ids=str,
)
def test_layers_by_key(selector, expected):
    model = modalities()
    paths = [re.sub(r"^module\.", "", path) for path in selected(selector, model, observation(2))]
    assert paths == expected


def test_each_modality_gets_its_own_rule():
    model, td = modalities(), observation(2)
    composite = [
        (Reads(("obs", "pixels")), FlatRule()),
        (Reads(("obs", "vector")), ZPlusRule()),
        (Linear, EpsilonRule()),
    ]
    plan = LRP(composite).plan(model, td)
    rules = {re.sub(r"^module\.", "", row.path): row.rule for row in plan if row.selector is not None}
    assert rules == {
        "0.module.0": FlatRule(),
        "0.module.2": EpsilonRule(),
        "1.module.0": ZPlusRule(),
        "3.module.0": EpsilonRule(),
        "3.module.2": EpsilonRule(),
    }


class TwoInputs(nn.Module):
    """Registers its two encoders in another order than their keys come in."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Linear(8, 2)
        self.second = nn.Linear(3, 4)
        self.first = nn.Linear(2, 4)

    def forward(self, a, b):
        return self.trunk(torch.cat([self.first(2 * a), self.second(b.flip(-1))], -1).relu())


def test_layers_by_key_inside_one_module():
    model = TensorDictModule(TwoInputs(), ["a", "b"], ["out"])
    td = TensorDict(a=torch.randn(5, 2), b=torch.randn(5, 3), batch_size=[5])
    assert selected(Reads("a"), model, td) == ["module.first"]
    assert selected(Reads("b"), model, td) == ["module.second"]
    assert selected(Writes("out"), model, td) == ["module.trunk"]


def test_a_key_that_meets_no_layer_is_read_by_its_tensordictmodule():
    model = TensorDictSequential(
        TensorDictModule(lambda a, b: a * b, ["a", "b"], ["ab"]),
        TensorDictModule(nn.Linear(3, 2), ["ab"], ["out"]),
    )
    td = TensorDict(a=torch.randn(5, 3), b=torch.randn(5, 3), batch_size=[5])
    (path,) = selected(Reads("a"), model, td)
    assert isinstance(model.get_submodule(path), TensorDictModule)
    assert selected(Writes("ab"), model, td) == [path]


def test_keys_are_found_in_a_lazy_stack():
    model = TensorDictModule(TwoInputs(), ["a", "b"], ["out"])
    tds = [TensorDict(a=torch.randn(2), b=torch.randn(3)) for _ in range(4)]
    lazy = LazyStackedTensorDict(*tds)
    assert selected(Reads("b"), model, lazy) == ["module.second"]
    method = LRP([(Reads("b"), FlatRule()), (Linear, EpsilonRule())])
    with method.prepare(model) as explained:
        got = explained(lazy)["attr", "b"]
    with method.prepare(model) as explained:
        torch.testing.assert_close(got, explained(torch.stack(tds).contiguous())["attr", "b"])


# --- As values ------------------------------------------------------------------------------------

VALUES = {
    "Type(Linear)": Type(nn.Linear),
    "Type('*RMSNorm')": Type("*RMSNorm"),
    "Type(Conv2d, Convolution, 'X*')": Type(nn.Conv2d, Convolution, "X*"),
    "Name('head.*')": Name("head.*"),
    "Reads('pixels')": Reads("pixels"),
    "Reads(('obs', 'pixels'))": Reads(("obs", "pixels")),
    "Writes('action')": Writes("action"),
    "First(Type(Linear))": First(nn.Linear),
    "Last(Name('a'))": Last("a"),
    "(Type(ReLU) & ~Name('head.*'))": Type(nn.ReLU) & ~Name("head.*"),
    "(Reads('a') | Writes('b'))": Reads("a") | Writes("b"),
    "~First((Type(ReLU) | Name('x')))": ~First(Type(nn.ReLU) | Name("x")),
    f"Type({ToyRMSNorm.__name__})": Type(ToyRMSNorm),
}
every_value = pytest.mark.parametrize("text", VALUES)


@every_value
def test_selectors_print_readably(text):
    assert repr(VALUES[text]) == text


@every_value
def test_selectors_go_through_json_and_copies(text):
    selector = VALUES[text]
    again = Selector.from_dict(json.loads(json.dumps(selector.to_dict())))
    assert again == selector and hash(again) == hash(selector) and repr(again) == text
    assert copy.deepcopy(selector) == selector and pickle.loads(pickle.dumps(selector)) == selector
    assert all((selector == other) == (text == key) for key, other in VALUES.items())


@pytest.mark.parametrize("pattern", [re.compile(r"^a\.\d+$"), re.compile("relu", re.IGNORECASE)], ids=repr)
def test_regular_expressions_go_through_json(pattern):
    selector = Name(pattern)
    again = Selector.from_dict(json.loads(json.dumps(selector.to_dict())))
    assert again == selector and again.pattern.flags == pattern.flags


def test_selectors_are_read_from_toml():
    text = """
    select = [
      "head.*",
      { type = "nn.Linear" },
      { type = ["Convolution", "*RMSNorm"] },
      { reads = ["obs", "pixels"] },
      { first = { all = [{ type = "Linear" }, { not = { name = "x" } }] } },
      { regex = "a$" },
    ]
    """
    assert [Selector.from_dict(entry) for entry in tomllib.loads(text)["select"]] == [
        Name("head.*"),
        Type(nn.Linear),
        Type(Convolution, "*RMSNorm"),
        Reads(("obs", "pixels")),
        First(Type(Linear) & ~Name("x")),
        Name(re.compile("a$")),
    ]


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"type": "nn.Linear", "name": "x"},
        {"kind": "Linear"},
        7,
        None,
        ["type"],
        {"type": []},
        {"type": 5},
        {"type": [5]},
        {"type": "nn.NoSuchLayer"},
        {"regex": "("},
        {"reads": 5},
        {"reads": ["obs", 5]},
        {"all": 5},
        {"all": []},
        {"first": {"kind": 1}},
    ],
    ids=repr,
)
def test_what_is_no_selector_is_a_value_error(data):
    with pytest.raises(ValueError, match=r"selector|expected|class|torch\.nn|regular|key|name"):
        Selector.from_dict(data)


def test_nothing_in_data_is_imported_or_evaluated():
    selector = Selector.from_dict({"type": "antigravity.__import__('os')"})
    assert selector == Type("antigravity.__import__('os')")
    assert "antigravity" not in sys.modules


def test_callables_are_not_data():
    with pytest.raises(TypeError, match="holds a callable, which cannot be written as plain data"):
        Where(len).to_dict()
    with pytest.raises(TypeError, match="callable"):
        (Type(nn.Linear) & Where(len)).to_dict()


@pytest.mark.parametrize("value", [5, None, (), ("a", "b"), (nn.Linear, 5), [nn.Linear]], ids=repr)
def test_what_selects_nothing_is_refused(value):
    with pytest.raises(TypeError, match="selects nothing: give a selector, a class"):
        as_selector(value)


def test_type_takes_classes_alone():
    for arguments in ((), (5,), (nn.Linear(1, 1),)):
        with pytest.raises(TypeError, match="Type takes classes or patterns of class names"):
            Type(*arguments)


def test_execution_order_needs_a_model():
    composite = LRP([(First(nn.Linear), FlatRule())]).composite
    with pytest.raises(ValueError, match="depends on the execution order of a whole model"):
        composite("fc", nn.Linear(2, 2))
