"""Exceptions on the way: out of the model, a rule, a target, the caller's block; the model is what it was before."""

from __future__ import annotations

import copy

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictSequential
from torch import nn
from unchanged import TRACED, Boom, Unchanged, attempt, every_method, every_way, network, observation

from tdhook import LRP, Key, Target
from tdhook.models.families import Linear
from tdhook.rules import EpsilonRule, FlatRule, PassRule, Rule
from tdhook.selectors import Name


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

    def block():
        with LRP(composite).prepare(model) as explained:
            if called:
                explained(td)
            raise Boom(explained)

    with pytest.raises(Boom) as caught:
        block()
    (explained,) = caught.value.args
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


def test_what_is_prepared_can_be_entered_again():
    model = nn.Linear(3, 2)
    prepared = LRP([(nn.Linear, EpsilonRule())]).prepare(model)
    results = []
    for _ in range(2):
        with prepared as explained:
            results.append(explained(TensorDict(input=torch.ones(5, 3), batch_size=[5]))["attr", "input"])
    assert torch.equal(*results)
    with prepared as outer, prepared as inner:
        assert outer is not inner
    for explained in (outer, inner):
        with pytest.raises(RuntimeError, match="ended with its `with` block"):
            explained(TensorDict(input=torch.ones(5, 3), batch_size=[5]))


def test_what_works_in_place_without_a_rule_spares_the_values_of_the_layer_before():
    def explain(inplace):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=inplace), nn.Linear(4, 2)).double()
        lrp = LRP(
            rule_mapper=lambda name, module: EpsilonRule() if isinstance(module, nn.Linear) else None,
            warn_on_missing_rule=False,
        )
        with lrp.prepare(model) as explained:
            return explained(TensorDict(input=torch.ones(5, 3).double(), batch_size=[5]))["attr", "input"]

    assert torch.equal(explain(True), explain(False))


def test_masked_logits_may_be_infinite():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 2, bias=False)

        def forward(self, x):
            return self.fc(x).masked_fill(torch.tensor([False, True]), float("-inf"))

    td = TensorDict(input=torch.rand(5, 3).double(), batch_size=[5])
    with LRP([(nn.Linear, EpsilonRule(1e-12))], target=Target("output", "argmax")).prepare(
        Masked().double()
    ) as explained:
        td = explained(td)
    assert td["output"][:, 1].isinf().all()
    torch.testing.assert_close(td["attr", "input"].sum(-1), td["output"][:, 0])
