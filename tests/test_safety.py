"""Bad input: a clear error, and a model and a TensorDict that are exactly what they were before."""

from __future__ import annotations

import copy

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn

from tdhook import LRP, Key, Target
from tdhook.attribution.lrp_helpers.rules import (
    AlphaBetaRule,
    EpsilonPlus,
    EpsilonRule,
    FlatRule,
    LayerNormRule,
    PassRule,
    Rule,
    UniformRule,
    ZBoxRule,
)
from tdhook.attribution.lrp_helpers.types import Linear
from tdhook.selectors import First, Name, Type

HOOKS = (
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks",
    "_forward_hooks_always_called",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_load_state_dict_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
)


class Unchanged:
    """Holds what a model and a TensorDict are, and says whether they still are."""

    def __init__(self, model: nn.Module, td: TensorDict | None = None) -> None:
        self.model, self.td = model, td
        self.before = self.look()

    def look(self):
        modules = dict(self.model.named_modules())
        seen = {
            "state_dict": {name: value.clone() for name, value in self.model.state_dict().items()},
            "tensors": {
                name: id(t) for name, t in [*self.model.named_parameters(), *self.model.named_buffers()]
            },
            "requires_grad": {name: p.requires_grad for name, p in self.model.named_parameters()},
            "grad": {name: p.grad is None for name, p in self.model.named_parameters()},
            "hooks": {name: {hook: dict(getattr(m, hook)) for hook in HOOKS} for name, m in modules.items()},
            "training": {name: m.training for name, m in modules.items()},
            "forward": {name: m.forward for name, m in modules.items()},
            "attributes": {name: list(vars(m)) for name, m in modules.items()},
            "inplace": {name: vars(m).get("inplace") for name, m in modules.items()},
        }
        if self.td is not None:
            entries = dict(self.td.items(True, True))
            seen["keys"] = {key: id(value) for key, value in entries.items()}
            seen["entries"] = {key: value.clone() for key, value in entries.items()}
            seen["batch_size"] = self.td.batch_size
        return seen

    def check(self) -> None:
        after = self.look()
        for what, before in self.before.items():
            if what in ("state_dict", "entries"):
                assert before.keys() == after[what].keys(), f"{what}: other names"
                for name, value in before.items():
                    same = torch.equal(value.nan_to_num(7.5), after[what][name].nan_to_num(7.5))
                    assert same and value.dtype == after[what][name].dtype, f"{what}: {name} changed"
            else:
                assert before == after[what], f"{what} changed"
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


class Boom(Exception):
    pass


def network() -> TensorDictModule:
    net = nn.Sequential(
        nn.Linear(3, 8),
        nn.ReLU(inplace=True),
        nn.BatchNorm1d(8),
        nn.Dropout(0.1),
        nn.Linear(8, 8),
        nn.Tanh(),
        nn.Linear(8, 4),
    )
    model = TensorDictModule(net, ["obs"], ["value"])
    net[0].register_forward_hook(lambda module, args, output: None)
    net[4].weight.requires_grad_(False)
    model.eval()
    net[3].train()
    return model


def observation(**entries):
    return TensorDict(obs=torch.randn(5, 3), **entries, batch_size=[5])


TRACED = [(First(Linear), FlatRule()), (Linear, EpsilonRule())]
METHODS = {
    "preset": "epsilon_plus",
    "traced": TRACED,
    "gradient": "guided_backprop",
}
every_method = pytest.mark.parametrize("composite", METHODS.values(), ids=METHODS)
every_way = pytest.mark.parametrize("way", ["prepare", "wrap"])


def attempt(model, td, error, text, composite="epsilon_plus", way="prepare", again=True, **kwargs):
    """It fails with the text, changes nothing, and works again on what is right."""
    unchanged = Unchanged(model, td)
    method = LRP(composite, **kwargs)
    with pytest.raises(error, match=text):
        if way == "wrap":
            method.wrap(model)(td)
        else:
            with method.prepare(model) as explained:
                explained(td)
    unchanged.check()
    if again:
        good = observation(value=torch.zeros(5, 4))
        with LRP(composite, target=Target("value", 0)).prepare(model) as explained:
            explained(good)
        assert good["attr", "obs"].isfinite().all()
        Unchanged(model).check()


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
    with pytest.raises(ValueError, match="input 'obs' has 1 NaN or infinite values"):
        with LRP(rule_mapper=EpsilonPlus(), skip_modules=LRP.default_skip).prepare(model) as explained:
            explained(td)
    unchanged.check()


class Overflow(nn.Module):
    def forward(self, x):
        return x * torch.inf


@every_method
def test_a_value_that_becomes_infinite_inside(composite):
    model = network()
    model.module.insert(1, Overflow())
    text = r"NaN or infinite though all inputs are finite: module 'module.1' \(Overflow\) is the first to return such a value"
    if composite != "guided_backprop":
        composite = [(Overflow, PassRule()), *TRACED]
    attempt(model, observation(), ValueError, text, composite, again=False)


@every_method
@pytest.mark.parametrize("shape", [(0,), (0, 4), (2, 0)])
def test_an_empty_batch(composite, shape):
    td = TensorDict(obs=torch.randn(*shape, 3), batch_size=shape)
    text = rf"there is nothing to explain: the TensorDict is empty \(batch size \[{', '.join(map(str, shape))}\]\)"
    attempt(network(), td, ValueError, text, composite)


def test_a_shape_that_does_not_fit():
    """The model's own error, not one about what was tried next."""
    for batch in ((5,), (2, 5), ()):
        td = TensorDict(obs=torch.randn(*batch, 7), batch_size=batch)
        attempt(network(), td, RuntimeError, "shapes cannot be multiplied")


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


# --- Exceptions on the way ------------------------------------------------------------------------


class Failing(Rule):
    """Fails in one of its passes."""

    def __init__(self, where):
        super().__init__()
        self.where = self._apply_kwargs["where"] = where

    @staticmethod
    def forward(ctx, apply_kwargs, module, model_kwargs, *inputs):
        ctx.where = apply_kwargs["where"]
        if ctx.where == "forward":
            raise Boom("in the rule's forward")
        return module._prev_forward(*inputs, **model_kwargs)

    @staticmethod
    def backward(ctx, *out_relevance):
        raise Boom("in the rule's backward")


class FailingEpsilon(EpsilonRule):
    """A built-in rule, derived in the library's own way."""

    def propagate(self, step, relevance):
        with torch.no_grad():
            step.modified(step.inputs, lambda name, p: p * 0)
        raise Boom("in the rule's backward")


class LateFailure(FlatRule):
    """Fails while parameters are replaced."""

    def propagate(self, step, relevance):
        def modify(name, p):
            raise Boom("in the rule's backward")

        return step.modified(step.inputs, modify)


@every_way
@pytest.mark.parametrize("layer", ["module.4", "module", ""], ids=["layer", "sequential", "tensordictmodule"])
@pytest.mark.parametrize(
    "rule",
    [Failing("forward"), Failing("backward"), FailingEpsilon(), LateFailure()],
    ids=lambda r: type(r).__name__,
)
def test_an_exception_in_a_rule(way, layer, rule):
    text = "in the rule's forward" if getattr(rule, "where", "") == "forward" else "in the rule's backward"
    composite = [(Name(layer), rule), (Linear, EpsilonRule())]
    attempt(network(), observation(), Boom, text, composite, way, again=False)


class Fragile(nn.Module):
    fails = True

    def forward(self, x):
        if self.fails:
            raise Boom("expected 4 dims, got something else")
        return x.view_as(x)


@every_method
@every_way
def test_an_exception_in_the_forward_pass(composite, way):
    model = network()
    model.module.append(Fragile())
    composite = composite if composite == "guided_backprop" else [(Fragile, PassRule()), *TRACED]
    try:
        attempt(model, observation(), Boom, "expected 4 dims", composite, way, again=False)
        Fragile.fails = False
        with LRP(composite).prepare(model) as explained:
            explained(observation())
    finally:
        Fragile.fails = True


@every_method
@pytest.mark.parametrize("called", [False, True])
def test_an_exception_in_the_callers_block(composite, called):
    model, td = network(), observation()
    unchanged, outer = Unchanged(model), Unchanged(model, td)
    with pytest.raises(Boom), LRP(composite).prepare(model) as explained:
        if called:
            explained(td)
        raise Boom
    (unchanged if called else outer).check()
    with pytest.raises(RuntimeError, match="ended with its `with` block"):
        explained(td)


def test_an_exception_in_a_target_or_an_initialiser():
    def fail(*args):
        raise Boom("in the function")

    attempt(network(), observation(), Boom, "in the function", target=fail, again=False)
    for name in ("init_attr_targets", "init_attr_inputs", "init_attr_grads"):
        attempt(network(), observation(), Boom, "in the function", **{name: fail}, again=False)


def test_one_bad_call_does_not_spoil_the_next():
    """A lasting module answers the same before and after every kind of failure."""
    model = network().eval()
    model.module[3].eval()
    explained = LRP(TRACED, target=Target("value", Key("index"))).wrap(model)
    good = observation(index=torch.arange(5) % 4)
    expected = explained(good.clone())
    bad = [
        good.exclude("obs"),
        good.exclude("index"),
        good.clone().set("index", torch.full((5,), 9)),
        good[:0],
    ]
    bad += [
        good.clone().set("obs", torch.full((5, 3), torch.nan)),
        good.clone().set("obs", torch.randn(5, 2)),
    ]
    unchanged = Unchanged(model)
    for td in bad:
        before = Unchanged(model, td)
        with pytest.raises((KeyError, IndexError, ValueError, RuntimeError)):
            explained(td)
        before.check()
        again = explained(good.clone())
        assert all(torch.equal(again[key], expected[key]) for key in expected.keys(True, True))
    unchanged.check()
    assert copy.deepcopy(explained)(good)["attr", "obs"].shape == (5, 3)
    TensorDictSequential(explained)
