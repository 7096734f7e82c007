"""Bad input: a clear error, and a model and a TensorDict that are exactly what they were before."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import EnsembleModule, TensorDictModule
from torch import nn
from unchanged import METHODS, TRACED, Boom, Unchanged, attempt, every_method, every_way, network, observation

from tdhook import LRP, Key, Target
from tdhook.models.families import Linear
from tdhook.rules import (
    AlphaBetaRule,
    EpsilonPlus,
    EpsilonRule,
    LayerNormRule,
    PassRule,
    UniformRule,
    ZBoxRule,
)
from tdhook.selectors import First, Name, Type


def test_an_explanation_leaves_no_trace_either():
    model, td = network(), observation()
    unchanged = Unchanged(model)
    x = td["obs"]
    before = x.clone()
    for composite in METHODS.values():
        with LRP(composite, attribute="all", input_modules=["0"]).prepare(model) as explained:
            unchanged.check()
            explained(td)
            unchanged.check()
        unchanged.check()
    assert td["obs"] is x and torch.equal(x, before) and not x.requires_grad


# --- The input ------------------------------------------------------------------------------------


@every_method
@every_way
def test_a_missing_key(composite, way):
    td = TensorDict(observation=torch.randn(5, 3), batch_size=[5])
    text = r"key 'obs' is missing from the TensorDict, which has observation; the explained module reads \['obs'\]"
    attempt(network(), td, KeyError, text, composite, way)


@every_method
def test_an_integer_input(composite):
    td = TensorDict(obs=torch.ones(5, 3, dtype=torch.int64), batch_size=[5])
    text = "none of the inputs .*'obs'.* is floating-point, so none can have relevance"
    with pytest.warns(UserWarning, match="input 'obs' is torch.int64, which has no gradient"):
        attempt(network(), td, ValueError, text, composite, again=False)


@every_method
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_input_that_is_not_finite(composite, value):
    td = observation()
    td["obs"][2, 1] = value
    attempt(network(), td, ValueError, "input 'obs' has 1 NaN or infinite values", composite)


def test_an_input_that_is_not_finite_under_a_rule_mapper():
    td, model = observation(), network()
    td["obs"][2, 1] = float("nan")
    unchanged = Unchanged(model, td)
    explained = LRP(rule_mapper=EpsilonPlus(), skip_modules=LRP.default_skip).wrap(model)
    with pytest.raises(ValueError, match="input 'obs' has 1 NaN or infinite values"):
        explained(td)
    unchanged.check()


class Overflow(nn.Module):
    def forward(self, x):
        return x * torch.inf


@every_method
def test_a_value_that_becomes_infinite_inside(composite):
    model = network()
    model.module.insert(1, Overflow())
    text = r"infinite though all inputs are finite: module 'module.1' \(Overflow\) is the first to return such a value"
    if composite != "guided_backprop":
        composite = [(Overflow, PassRule()), *TRACED]
    attempt(model, observation(), ValueError, text, composite, again=False)


@every_method
@pytest.mark.parametrize("shape", [(0,), (0, 4), (2, 0)])
def test_an_empty_batch(composite, shape):
    td = TensorDict(obs=torch.randn(*shape, 3), batch_size=shape)
    text = rf"there is nothing to explain: the TensorDict is empty \(batch size \[{', '.join(map(str, shape))}\]\)"
    attempt(network(), td, ValueError, text, composite)


def test_an_entry_without_features_is_no_empty_batch():
    class Joined(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(3, 2)

        def forward(self, x, nothing):
            return self.head(torch.cat([x, nothing], -1))

    model = TensorDictModule(Joined(), ["x", "nothing"], ["y"])
    td = TensorDict(x=torch.randn(2, 3), nothing=torch.zeros(2, 0), batch_size=[2])
    with LRP("epsilon_plus", target=Target("y", 0)).prepare(model) as run:
        done = run(td)
    assert done["attr", "x"].any() and done["attr", "nothing"].shape == (2, 0)


def test_a_shape_that_does_not_fit():
    """The model's own error, not one about what was tried next."""
    for batch in ((5,), (2, 5), ()):
        td = TensorDict(obs=torch.randn(*batch, 7), batch_size=batch)
        attempt(network(), td, RuntimeError, "shapes cannot be multiplied")


def test_a_model_that_changes_the_batch_shape():
    ensemble = EnsembleModule(TensorDictModule(nn.Linear(4, 1), ["obs"], ["value"]), 3)
    td = TensorDict(obs=torch.randn(2, 4), batch_size=[2])
    attempt(
        ensemble, td, ValueError, r"batch size \[3, 2\] for one of \[2\]", again=False, target=Target("value")
    )


# --- The target -----------------------------------------------------------------------------------


@every_method
@every_way
@pytest.mark.parametrize(
    "target, error, text",
    [
        (Target("value", 4), IndexError, r"target index 4 is out of range for 'value', which has 4 outputs"),
        (
            Target("value", Key("far")),
            IndexError,
            "target index 9 from entry 'far' is out of range for 'value'",
        ),
        (Target("q"), KeyError, "the target names 'q', which the module did not write; it has value"),
        (Target("value", "action"), KeyError, "the target takes its index from 'action', which is not there"),
    ],
    ids=["index", "index of an entry", "key", "entry"],
)
def test_a_target_that_does_not_fit(composite, way, target, error, text):
    attempt(network(), observation(far=torch.full((5,), 9)), error, text, composite, way, target=target)


class Deaf(nn.Module):
    """Writes what does not depend on what it reads."""

    def __init__(self, learned):
        super().__init__()
        self.fc, self.act = nn.Linear(3, 4), nn.ReLU()
        self.constant = nn.Parameter(torch.ones(4), requires_grad=learned)

    def forward(self, x):
        return self.act(self.fc(x)), self.constant.expand(len(x), 4)


@every_method
@pytest.mark.parametrize("learned", [True, False])
def test_a_target_that_depends_on_no_input(composite, learned):
    model = TensorDictModule(Deaf(learned), ["obs"], ["value", "constant"])
    text = r"the target 'constant' does not depend on any attributed input \('obs'\)"
    if composite != "guided_backprop":
        composite = [*TRACED, (nn.ReLU, PassRule())]
    attempt(model, observation(), ValueError, text, composite, target=Target("constant", 1))


# --- The composite --------------------------------------------------------------------------------


@every_way
@pytest.mark.parametrize(
    "rule, selector, error, text",
    [
        (PassRule(), Name("module.6"), ValueError, r"Input \(shape=.* have different shapes at index 0"),
        (
            UniformRule(),
            Name("module.6"),
            ValueError,
            "UniformRule gives each input an equal part .* use UniformEpsilonRule",
        ),
        (
            LayerNormRule(),
            Name("module.6"),
            ValueError,
            "LayerNormRule fits modules with .* which Linear has not",
        ),
        (
            ZBoxRule(torch.zeros(2), 1.0),
            Name("module.0"),
            ValueError,
            r"ZBoxRule: low of shape \(2,\) does not broadcast",
        ),
    ],
    ids=str,
)
def test_a_rule_that_does_not_fit_its_module(way, rule, selector, error, text):
    composite = [(selector, rule), (Linear, EpsilonRule())]
    attempt(network(), observation(), error, text, composite, way, again=False)


def test_a_rule_for_one_input_on_a_module_with_two():
    model = TensorDictModule(nn.Bilinear(3, 3, 4), ["obs", "other"], ["value"])
    td = observation(other=torch.randn(5, 3))
    text = "AlphaBetaRule does not support multiple inputs"
    attempt(model, td, NotImplementedError, text, [(nn.Bilinear, AlphaBetaRule())], again=False)


@every_way
@pytest.mark.parametrize("selector", [Type(nn.Conv2d), Name("no.such.module"), First(nn.Conv2d)], ids=repr)
def test_a_composite_that_matches_nothing(way, selector):
    text = "the composite matches no module of this model:\n.*\n.*\n.*\nIt has .*Linear"
    attempt(network(), observation(), ValueError, text, [(selector, EpsilonRule())], way, again=False)


def test_a_mapper_that_fails_or_returns_no_rule():
    model, td = network(), observation()

    def fails(name, module):
        if name == "module.4":
            raise Boom(name)
        return EpsilonRule()

    attempt(model, td, Boom, "module.4", None, rule_mapper=fails, again=False)
    text = "the rule mapper returned 'epsilon' for module `module.4`, which is no rule"
    mapper = {"module.4": "epsilon"}
    attempt(model, td, TypeError, text, None, rule_mapper=lambda name, module: mapper.get(name), again=False)
    with pytest.raises(TypeError, match="give LRP a composite or a rule_mapper, not both"):
        LRP("epsilon_plus", rule_mapper=fails)
