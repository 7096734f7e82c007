"""Through: what the ledger says, how choices hold, and what is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from passing import OUTPUT, Residual, convolutional, explain, of, relevance
from tensordict import TensorDict
from torch import nn

from tdhook.attribution import (
    LRP,
    Ablation,
    Conductance,
    GradientTimesInput,
    GuidedBackprop,
    IntegratedGradients,
)
from tdhook.selectors import First, Last, Name, Op
from tdhook.targets import AtStep, Contrast, Key, Target, Through


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


LEDGERS = {
    "epsilon": LRP("epsilon", ledger=True),
    "the other flow": LRP("epsilon_plus", flow="relevance", ledger=True),
    "against a baseline": LRP("deeplift", baseline=0.2, ledger=True),
    "against two": LRP("deeplift", baseline="sample", samples=2, ledger=True),
}


@pytest.mark.parametrize("beside", ["closed", "counted"])
@pytest.mark.parametrize("method", LEDGERS.values(), ids=list(LEDGERS))
def test_what_did_not_pass_is_absorbed_by_the_condition(method, beside):
    model, td = Residual(bias=True).double(), of(5, 4)
    whole = explain(method.explaining(OUTPUT), model, td) if method.samples < 2 else None
    target = Through(OUTPUT, "inside", [1, (0, 2, 3)], beside=beside)
    explained = method.explaining(target).wrap(model)
    found = explained(td.clone())
    ledger = found["ledger"]
    torch.testing.assert_close(ledger["gap"], torch.zeros(5, 2).double(), rtol=0, atol=1e-9)
    torch.testing.assert_close(ledger["inputs"], found["attr", "input"].sum(-1), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ledger["target"], ledger["inputs"] + ledger["absorbed"], rtol=1e-9, atol=1e-9)
    if whole is not None:
        same = whole["ledger", "target"].unsqueeze(1).expand(5, 2)
        torch.testing.assert_close(ledger["target"], same)
    entry = explained.ledger.summary()[-1]
    assert (entry.path, entry.name) == ("inside", "Through")
    assert entry.of("condition").abs().sum() > 0
    assert "condition" in explained.ledger.columns
    assert ">inside<" in explained.ledger._repr_html_()


def test_the_columns_of_other_ledgers_are_as_they_were():
    explained = LRP("epsilon", target=OUTPUT, ledger=True).wrap(Residual().double())
    explained(of(2, 4))
    assert "condition" not in explained.ledger.columns


def test_others_are_taken_away_where_they_meet_what_goes_around():
    """As a mask on the gradient of the layer does it, also where what travels back is cut off at zero."""

    class Masked(Residual):
        def forward(self, x):
            h = F.relu(self.enter(x))
            z = self.inside(h)
            mask = F.one_hot(torch.tensor(2), 6).double()
            return self.leave(h + torch.relu(z * mask + (z * (1 - mask)).detach()))

    model, td = Residual().double(), of(3, 4)
    masked = Masked().double()
    masked.load_state_dict(model.state_dict())
    found = relevance(GuidedBackprop(Through(OUTPUT, "inside", 2, beside="counted")), model, td)
    torch.testing.assert_close(found, relevance(GuidedBackprop(OUTPUT), masked, td))


def test_choices_hold_along_a_path():
    """Which unit matters most is asked of the input as it is, and not anew of each step."""
    model, td = Residual(bias=True).double(), of(64, 4)
    method = Through(Target("output", 0), "inside", "top:1")
    top = explain(IntegratedGradients(method, steps=7), model, td)
    td["unit"] = top["units", "inside"].squeeze(-1)
    named = relevance(
        IntegratedGradients(Through(Target("output", 0), "inside", Key("unit")), steps=7), model, td
    )
    torch.testing.assert_close(top["attr", "input"].squeeze(1), named)
    near_zero = TensorDict({"input": 0.1 * td["input"]}, [64])
    elsewhere = explain(GradientTimesInput(method), model, near_zero)["units", "inside"]
    assert not torch.equal(elsewhere, top["units", "inside"])  # it would have been another one there


def test_choices_of_a_chain_hold_each_on_its_own():
    model, td = convolutional().double(), of(2, 1, 8, 8)
    chain = Through(Through(OUTPUT, "3", [1, 2], axis=1), "1", "top:2", axis=1)
    with pytest.raises(ValueError, match="not the same for each of several outputs"):
        relevance(IntegratedGradients(chain, steps=3), model, td)
    chain = Through(Through(OUTPUT, "3", (1, 2), axis=1), "1", [0, 3], axis=1)
    found = relevance(IntegratedGradients(chain, steps=3), model, td)
    every = relevance(
        IntegratedGradients(Through(Through(OUTPUT, "3", axis=1), "1", axis=1), steps=3), model, td
    )
    every = every.unflatten(1, (5, 4))
    torch.testing.assert_close(found, every[:, 1, [0, 3]] + every[:, 2, [0, 3]])


def test_all_of_a_path_through_units_is_their_conductance():
    """Dhamdhere et al. 2019, eq. 2: integrated gradients through a unit add up to its conductance."""
    model, td = Residual(bias=True).double(), of(3, 4)
    through = relevance(IntegratedGradients(Through(OUTPUT, "inside"), steps=2000, rule="middle"), model, td)
    at_layer = explain(Conductance(OUTPUT, steps=2000, input_modules=["inside"], use_inputs=False), model, td)
    torch.testing.assert_close(through.sum(-1), at_layer["attr", "inside"], rtol=0, atol=2e-3)


def test_contrasts_and_steps_go_inside():
    model, td = Residual(bias=True).double(), of(2, 3, 4, batch=2)
    contrast = Contrast(Target("output", 0), Target("output", 1))
    found = relevance(LRP("epsilon", target=Through(contrast, "inside")), model, td)
    one, other = (
        relevance(LRP("epsilon", target=Through(Target("output", i), "inside")), model, td) for i in (0, 1)
    )
    torch.testing.assert_close(found, one - other)
    inside = relevance(GradientTimesInput(Through(AtStep(Target("output", 0), 1), "inside")), model, td)
    outside = relevance(GradientTimesInput(AtStep(Through(Target("output", 0), "inside"), 1)), model, td)
    torch.testing.assert_close(inside, outside)
    assert (inside[:, [0, 2]] == 0).all()
    assert (inside[:, 1] != 0).any()


def test_layers_get_relevance_from_unit_to_unit():
    model, td = convolutional().double(), of(2, 1, 8, 8)
    method = LRP("epsilon_plus", target=Through(OUTPUT, "3", axis=1), input_modules=["1"], use_inputs=False)
    found = explain(method, model, td)["attr", "1"]
    assert found.shape == (2, 5, 4, 6, 6)
    whole = explain(LRP("epsilon_plus", target=OUTPUT, input_modules=["1"]), model, td)["attr", "1"]
    torch.testing.assert_close(found.sum(1), whole)


@pytest.mark.parametrize("units", ["all", "top:2", 3, (0, 1)], ids=str)
def test_compiled_is_the_same(units):
    model, td = Residual(bias=True).double(), of(3, 4)
    target = Through(OUTPUT, "inside", units)
    eager = explain(LRP("epsilon_plus", target=target), model, td)
    compiled = explain(LRP("epsilon_plus", target=target, compile={"backend": "aot_eager"}), model, td)
    torch.testing.assert_close(compiled["attr", "input"], eager["attr", "input"])
    if units == "top:2":
        assert torch.equal(compiled["units", "inside"], eager["units", "inside"])


def test_memory_budgets_change_nothing():
    model, td = convolutional(), of(2, 1, 8, 8)
    target = Through(OUTPUT, "1", axis=1)
    one = relevance(LRP("epsilon_plus", target=target, memory_budget=0), model, td)
    torch.testing.assert_close(one, relevance(LRP("epsilon_plus", target=target), model, td))


def test_targets_are_values():
    a = Through(Target("q", 1), "layer", [1, (2, 3)], axis=1)
    assert a == Through(Target("q", 1), "layer", [1, (2, 3)], axis=1)
    assert hash(a) == hash(Through(Target("q", 1), "layer", [1, (2, 3)], axis=1))
    assert a != Through(Target("q", 1), "layer", [1, (2, 4)], axis=1)
    assert a != Through(Target("q", 1), "layer", [1, (2, 3)], axis=1, beside="counted")


WRONG = {
    "units of no kind": (lambda: Through(OUTPUT, "1", 1.5), TypeError, "units are an int"),
    "no units": (lambda: Through(OUTPUT, "1", []), TypeError, "units are an int"),
    "another word": (lambda: Through(OUTPUT, "1", "most"), ValueError, r"write Key\('most'\)"),
    "top none": (lambda: Through(OUTPUT, "1", "top:0"), ValueError, "'all' nor 'top:8'"),
    "another side": (lambda: Through(OUTPUT, "1", beside="open"), ValueError, "'closed' or 'counted'"),
    "a selector of modules": (
        lambda: Through(OUTPUT, Name("1")),
        TypeError,
        "selects modules; name the path",
    ),
    "no place": (lambda: Through(OUTPUT, 3), TypeError, "a place is a path"),
}


@pytest.mark.parametrize("make, kind, said", WRONG.values(), ids=list(WRONG))
def test_what_cannot_be_meant_is_refused(make, kind, said):
    with pytest.raises(kind, match=said):
        make()


REFUSED = {
    "no such module": (Through(OUTPUT, "nine", axis=1), ValueError, "no module 'nine'; it has 0, 1"),
    "no such key": (Through(OUTPUT, ("a", "b")), ValueError, r"neither reads nor writes \('a', 'b'\)"),
    "several axes": (
        Through(OUTPUT, "1"),
        ValueError,
        r"'1' has the axes \['batch', 4, 6, 6\]: say along which its units lie",
    ),
    "the axis of the batch": (Through(OUTPUT, "1", axis=0), IndexError, "axis=0 is no axis of units of '1'"),
    "no such axis": (Through(OUTPUT, "1", axis=-4), IndexError, "they lie along one of 1 to 3"),
    "no such unit": (Through(OUTPUT, "1", 4, axis=1), IndexError, "unit 4 is out of range: '1' has 4 units"),
    "too many": (
        Through(OUTPUT, "1", "top:5", axis=1),
        IndexError,
        "'top:5' are more than the 4 units of '1'",
    ),
    "uneven heads": (Through(OUTPUT, "1", axis=1, heads=3), ValueError, "does not consist of 3 equal heads"),
    "no such entry": (Through(OUTPUT, "1", Key("unit"), axis=1), KeyError, "entry 'unit', which names units"),
    "numbers with a point": (
        Through(OUTPUT, "1", torch.tensor([0.5, 1.0]), axis=1),
        TypeError,
        "the tensor of units of dtype torch.float32 names no units",
    ),
    "of another batch": (
        Through(OUTPUT, "1", torch.tensor([0, 1, 2]), axis=1),
        ValueError,
        r"shape \[3\] names units of '1' neither one nor several",
    ),
    "marks of another width": (
        Through(OUTPUT, "1", torch.ones(2, 3, dtype=torch.bool), axis=1),
        ValueError,
        r"marks units by truth values, \[4\] or \[2, 4\], and has the shape \[2, 3\]",
    ),
    "most of several outputs": (
        Through(Target("output", "all"), "1", "top:2", axis=1),
        ValueError,
        "not the same for each of several outputs",
    ),
}


@pytest.mark.parametrize("target, kind, said", REFUSED.values(), ids=list(REFUSED))
def test_what_the_model_does_not_have_is_refused(target, kind, said):
    with pytest.raises(kind, match=said):
        relevance(GradientTimesInput(target), convolutional(), of(2, 1, 8, 8))


def test_a_layer_that_the_target_does_not_depend_on_is_named():
    class Two(Residual):
        def forward(self, x):
            self.inside(x[..., :1].expand(*x.shape[:-1], 6))
            return self.leave(self.enter(x))

    with pytest.raises(ValueError, match=r"the target 'output' does not depend on 'inside'"):
        relevance(LRP("epsilon", target=Through(OUTPUT, "inside")), Two(), of(2, 4))


def test_methods_that_only_run_forwards_say_so():
    with pytest.raises(TypeError, match="runs the model forwards alone"):
        relevance(Ablation(Through(OUTPUT, "inside")), Residual(), of(2, 4))


@pytest.mark.parametrize("options", [{"tolerance": 1e-3}, {"ledger": True}], ids=["tolerance", "ledger"])
def test_what_passes_units_has_no_value_that_a_sum_could_be_off(options):
    with pytest.raises(TypeError, match="explain it without tolerance and ledger, by a number of steps"):
        relevance(IntegratedGradients(Through(OUTPUT, "inside"), **options), Residual(), of(2, 4))


def test_the_model_is_left_as_it_was_after_an_error():
    model, td = convolutional().double(), of(2, 1, 8, 8)
    with pytest.raises(IndexError):
        relevance(LRP("epsilon", target=Through(OUTPUT, "1", 9, axis=1)), model, td)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.overrides._get_current_function_mode() is None


class WeightsToo(nn.Module):
    """Weights go through the same operation as values, before these."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(3, 4), nn.Linear(4, 2, bias=False)

    def forward(self, x):
        scale = torch.relu(self.inner.weight.sum(1) + 1)
        h = torch.relu(self.inner(x))
        return self.head(torch.relu(h + 0.1) * scale)


@pytest.mark.parametrize("selector", [First(Op("relu")), Last(Op("relu"))])
def test_operations_on_weights_are_none_of_those_that_are_counted(selector):
    torch.manual_seed(0)
    model, td = WeightsToo().double(), TensorDict({"input": torch.rand(5, 3).double()}, [5])
    target = Through(Target("output", 0), selector, "all")
    found = [
        method(target).wrap(model)(td.clone())["attr", "input"]
        for method in (GradientTimesInput, lambda target: LRP("epsilon", target=target))
    ]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)
    assert found[0].shape == (5, 4, 3)
