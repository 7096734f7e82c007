"""Relevance through units of a layer: what passes them, alone and together, wherever they are."""

from __future__ import annotations

import pytest
import torch
from drawing import drawing
from hypothesis import given
from hypothesis import strategies as st
from passing import METHODS, OUTPUT, Block, Residual, convolutional, explain, of, relevance
from tensordict import TensorDict
from torch import nn

from tdhook.attribution import (
    LRP,
    GradientTimesInput,
)
from tdhook.rules import EpsilonRule
from tdhook.selectors import Op
from tdhook.targets import Key, Target, Through

EXACT = [(Op("*"), EpsilonRule(1e-12)), (nn.Linear, EpsilonRule(1e-12))]


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


MODELS = {
    "convolutional": (convolutional, (3, 1, 8, 8), "1", 1, 4),
    "residual": (Residual, (3, 4), "inside", None, 6),
    "after the sum of branches": (Residual, (3, 4), Op("add"), None, 6),
    "heads": (Block, (2, 5, 8), Op("scaled_dot_product_attention"), 1, 2),
    "heads of a width": (lambda: Block(), (2, 5, 8), "out", -1, 8),
    "tokens": (Block, (2, 5, 8), "down", 1, 5),
    "neurons": (Block, (2, 5, 8), Op("gelu"), -1, 12),
}


@pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))
@pytest.mark.parametrize("make, shape, place, axis, count", MODELS.values(), ids=list(MODELS))
def test_units_add_up_to_what_passes_the_layer(method, make, shape, place, axis, count):
    model, td = make(), of(*shape)
    each = relevance(method.explaining(Through(OUTPUT, place, axis=axis)), model, td)
    all_ = relevance(method.explaining(Through(OUTPUT, place, tuple(range(count)), axis=axis)), model, td)
    whole = relevance(method.explaining(OUTPUT), model, td)
    assert each.shape == (shape[0], count, *shape[1:])
    torch.testing.assert_close(each.sum(1), all_, rtol=0, atol=1e-9)
    if place in ("1",) or repr(place) == "Op('add')":  # nothing goes around it
        torch.testing.assert_close(all_, whole, rtol=0, atol=1e-9)
    else:
        assert not torch.allclose(all_, whole, atol=1e-3)


@pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))
def test_what_goes_around_the_layer_is_counted_if_so_asked(method):
    model, td = Residual(), of(3, 4)
    whole = relevance(method.explaining(OUTPUT), model, td)
    closed = relevance(method.explaining(Through(OUTPUT, "inside", [1, (0, 2)])), model, td)
    others = relevance(
        method.explaining(Through(OUTPUT, "inside", [(0, 2, 3, 4, 5), (1, 3, 4, 5)])), model, td
    )
    counted = relevance(
        method.explaining(Through(OUTPUT, "inside", [1, (0, 2)], beside="counted")), model, td
    )
    torch.testing.assert_close(counted, whole.unsqueeze(1) - others, rtol=0, atol=1e-9)
    assert not torch.allclose(counted, closed, atol=1e-3)


def matrices(model, x, index):
    """Of an ``epsilon`` explanation of :class:`Residual`, the relevance of inputs through each inner unit."""
    w1, w2, w3 = (m.weight.detach() for m in (model.enter, model.inside, model.leave))
    a = w1 @ x
    h = a.clamp(min=0)
    z = w2 @ h
    b = z.clamp(min=0)
    at_sum = w3[index] * (h + b)
    at_b = torch.where(h + b == 0, 0.0, at_sum * b / (h + b))  # the branch's share of the sum
    down = w2 * h / z.unsqueeze(1) * at_b.unsqueeze(1)  # [units, hidden]
    return (down / torch.where(a == 0, 1.0, a)) @ (w1 * x)  # [units, inputs]


def test_against_matrices():
    model, td = Residual().double(), of(4, 4)
    found = relevance(LRP(EXACT, target=Through(OUTPUT, "inside")), model, td)
    index = model(td["input"]).argmax(-1)
    expected = torch.stack([matrices(model, x, i) for x, i in zip(td["input"], index, strict=True)])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@drawing(30, deadline=None)
@given(data=st.data())
def test_units_of_any_layer_add_up(data):
    torch.manual_seed(data.draw(st.integers(0, 2**16)))
    width = data.draw(st.integers(1, 7))
    depth = data.draw(st.integers(1, 3))
    batch = data.draw(st.lists(st.integers(1, 3), min_size=0, max_size=3))
    layers = [nn.Linear(4, width), nn.Tanh()]
    for _ in range(depth):
        layers += [nn.Linear(width, width), data.draw(st.sampled_from([nn.ReLU(), nn.GELU()]))]
    model = nn.Sequential(*layers, nn.Linear(width, 2)).double()
    td = TensorDict({"input": torch.randn(*batch, 4).double()}, batch)
    place = data.draw(st.sampled_from([str(i) for i in range(len(layers))]))
    method = data.draw(st.sampled_from([METHODS[name] for name in ("epsilon_plus", "deeplift", "gradient")]))
    each = relevance(method.explaining(Through("output", place)), model, td)
    whole = relevance(method.explaining(Target("output")), model, td)
    assert each.shape == (*batch, width, 4)
    torch.testing.assert_close(each.sum(-2), whole, rtol=1e-9, atol=1e-9)


def test_a_concept_through_a_concept():
    model, td = convolutional(), of(2, 1, 8, 8)
    chain = Through(Through(OUTPUT, "3", [1, 2], axis=1), "1", axis=1)
    found = relevance(LRP("epsilon_plus", target=chain), model, td)
    each = relevance(LRP("epsilon_plus", target=Through(OUTPUT, "3", [1, 2], axis=1)), model, td)
    assert found.shape == (2, 2 * 4, 1, 8, 8)
    torch.testing.assert_close(found.unflatten(1, (2, 4)).sum(2), each, rtol=0, atol=1e-12)


def test_several_outputs_come_outermost():
    model, td = convolutional(), of(2, 1, 8, 8)
    found = relevance(GradientTimesInput(Through(Target("output", "all"), "3", [0, 4], axis=1)), model, td)
    for output in range(3):
        one = relevance(GradientTimesInput(Through(Target("output", output), "3", [0, 4], axis=1)), model, td)
        torch.testing.assert_close(found.unflatten(1, (3, 2))[:, output], one)


def test_several_outputs_with_what_goes_around():
    model, td = Residual().double(), of(2, 4)
    method = LRP("epsilon", ledger=True)
    target = Through(Target("output", "all"), "inside", [0, (1, 4)], beside="counted")
    found = explain(method.explaining(target), model, td)
    for output in range(3):
        only = Through(Target("output", output), "inside", [0, (1, 4)], beside="counted")
        one = explain(method.explaining(only), model, td)
        torch.testing.assert_close(
            found["attr", "input"].unflatten(1, (3, 2))[:, output], one["attr", "input"]
        )
        for name in ("target", "inputs", "absorbed"):
            of_output = found["ledger", name].unflatten(1, (3, 2))[:, output]
            torch.testing.assert_close(of_output, one["ledger", name])


def test_the_ledger_of_a_chain_is_of_all_that_was_explained():
    model, td = Residual(bias=True).double(), of(3, 4)
    method = LRP("epsilon", ledger=True)
    chain = Through(Through(OUTPUT, "inside", (0, 2)), "enter", [1, 3])
    found, whole = (explain(method.explaining(target), model, td)["ledger"] for target in (chain, OUTPUT))
    torch.testing.assert_close(found["target"], whole["target"].unsqueeze(1).expand(3, 2))
    torch.testing.assert_close(found["gap"], torch.zeros(3, 2).double(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("batch", [(), (5,), (2, 3), (1, 2, 2)], ids=str)
def test_any_batch_shape_has_the_same(batch):
    model = convolutional()
    td = TensorDict({"input": torch.randn(*batch, 1, 8, 8).double()}, batch)
    found = explain(LRP("epsilon_plus", target=Through(OUTPUT, "3", "top:2", axis=1)), model, td)
    assert found["attr", "input"].shape == (*batch, 2, 1, 8, 8)
    assert found["units", "3"].shape == (*batch, 2)
    rows = td.reshape(-1) if batch else td.unsqueeze(0)
    flat = explain(LRP("epsilon_plus", target=Through(OUTPUT, "3", "top:2", axis=1)), model, rows)
    torch.testing.assert_close(
        found["attr", "input"].reshape(flat["attr", "input"].shape), flat["attr", "input"]
    )


def test_the_units_that_matter_most_are_named_in_order():
    model, td = convolutional(), of(3, 1, 8, 8)
    method = LRP("epsilon_plus", input_modules=["3"])
    at_layer = explain(method.explaining(OUTPUT), model, td)["attr", "3"].sum((-1, -2))
    found = explain(method.explaining(Through(OUTPUT, "3", "top:3", axis=1)), model, td)
    torch.testing.assert_close(found["units", "3"], at_layer.abs().topk(3).indices)
    every = relevance(method.explaining(Through(OUTPUT, "3", axis=1)), model, td)
    index = found["units", "3"].reshape(3, 3, 1, 1, 1).expand(3, 3, 1, 8, 8)
    torch.testing.assert_close(found["attr", "input"], every.gather(1, index))


def test_against_a_baseline_those_matter_most_that_changed():
    model, td = Residual(bias=True).double(), of(3, 4)
    method = LRP("deeplift", baseline=0.5, input_modules=["inside"])
    at_layer = explain(method.explaining(OUTPUT), model, td)["attr", "inside"]
    found = explain(method.explaining(Through(OUTPUT, "inside", "top:2")), model, td)
    torch.testing.assert_close(found["units", "inside"], at_layer.abs().topk(2).indices)


def test_units_from_entries_and_tensors():
    model, td = Residual(), of(3, 4)
    every = relevance(GradientTimesInput(Through(OUTPUT, "inside")), model, td)
    td["one"], td["two"] = torch.tensor([0, 5, -1]), torch.tensor([[0, 1], [2, 2], [5, 3]])
    td["marks"] = torch.eye(6)[[1, 2, 3]].bool() | torch.eye(6)[0].bool()
    rows = torch.arange(3)
    one = relevance(GradientTimesInput(Through(OUTPUT, "inside", Key("one"))), model, td)
    torch.testing.assert_close(one, every[rows, td["one"]])
    two = relevance(GradientTimesInput(Through(OUTPUT, "inside", Key("two"))), model, td)
    torch.testing.assert_close(two, every[rows.unsqueeze(1), td["two"]])
    marks = relevance(GradientTimesInput(Through(OUTPUT, "inside", Key("marks"))), model, td)
    torch.testing.assert_close(marks, every[:, 0] + every[rows, [1, 2, 3]])
    given = relevance(GradientTimesInput(Through(OUTPUT, "inside", td["two"])), model, td)
    torch.testing.assert_close(given, two)
    td["bytes"] = torch.tensor([0, 5, 2], dtype=torch.uint8)
    found = relevance(GradientTimesInput(Through(OUTPUT, "inside", Key("bytes"))), model, td)
    torch.testing.assert_close(found, every[rows, [0, 5, 2]])
