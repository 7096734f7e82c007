"""Relevance through units of a layer: what passes them, alone and together, wherever they are."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from drawing import drawing
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn

from tdhook.attribution import (
    LRP,
    Ablation,
    Averaged,
    Conductance,
    Gradient,
    GradientTimesInput,
    GuidedBackprop,
    IntegratedGradients,
    Noise,
)
from tdhook.rules import EpsilonRule, GammaRule
from tdhook.selectors import First, Last, Name, Op
from tdhook.targets import AtStep, Contrast, Key, Target, Through

EXACT = [(Op("*"), EpsilonRule(1e-12)), (nn.Linear, EpsilonRule(1e-12))]
OUTPUT = Target("output", "argmax")


class Residual(nn.Module):
    """Three blocks, the second of which has a branch around it."""

    def __init__(self, bias: bool = False):
        super().__init__()
        self.enter = nn.Linear(4, 6, bias=bias)
        self.inside = nn.Linear(6, 6, bias=bias)
        self.leave = nn.Linear(6, 3, bias=bias)

    def forward(self, x):
        h = F.relu(self.enter(x))
        return self.leave(h + torch.relu(self.inside(h)))


class Block(nn.Module):
    """A transformer block of torch's functions, ``[batch, tokens, width]``."""

    def __init__(self, width: int = 8, heads: int = 2):
        super().__init__()
        self.heads = heads
        self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 12), nn.Linear(12, width)
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.before(x)).chunk(3, -1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        x = x + self.down(F.gelu(self.up(self.after(x))))
        return self.head(x).sum(1)


def convolutional():
    layers = (nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(80, 3))
    return nn.Sequential(*layers)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def of(*shape, batch=1):
    return TensorDict({"input": torch.randn(*shape, dtype=torch.float64)}, shape[:batch])


def explain(method, model, td):
    return method.wrap(model.double())(td.clone())


def relevance(method, model, td):
    return explain(method, model, td)["attr", "input"]


METHODS = {
    "epsilon_plus": LRP("epsilon_plus"),
    "epsilon, the other flow": LRP("epsilon", flow="relevance"),
    "attn_lrp": LRP("attn_lrp"),
    "deeplift": LRP("deeplift", baseline=0.0),
    "relevance flow against data": LRP("epsilon", flow="relevance", baseline=0.3),
    "gradient times input": GradientTimesInput(),
    "gradient": Gradient(signed=True),
    "integrated gradients": IntegratedGradients(steps=5),
    "smooth": Averaged(GradientTimesInput(), Noise(0.1, 3)),
}
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


def test_heads_are_equal_parts_of_an_axis():
    model, td = Block(), of(2, 5, 8)
    parts = relevance(GradientTimesInput(Through(OUTPUT, "up", heads=3, axis=-1)), model, td)
    each = relevance(GradientTimesInput(Through(OUTPUT, "up", axis=-1)), model, td)
    torch.testing.assert_close(parts, each.unflatten(1, (3, 4)).sum(2), rtol=1e-9, atol=1e-12)


def test_a_key_of_a_sequence_is_a_place():
    policy = TensorDictSequential(
        TensorDictModule(nn.Linear(4, 6), ["obs"], ["hidden"]),
        TensorDictModule(nn.Sequential(nn.ReLU(), nn.Linear(6, 3)), ["hidden"], ["q"]),
    )
    td = TensorDict({"obs": torch.randn(3, 4).double()}, [3])
    by_key = explain(LRP("epsilon", target=Through(Target("q", 1), "hidden")), policy, td)
    by_path = explain(LRP("epsilon", target=Through(Target("q", 1), "0.module")), policy, td)
    torch.testing.assert_close(by_key["attr", "obs"], by_path["attr", "obs"])
    own = explain(LRP("epsilon", target=Through(Target("q", 1), "obs", 2)), policy, td)["attr", "obs"]
    whole = explain(LRP("epsilon", target=Target("q", 1)), policy, td)["attr", "obs"]
    torch.testing.assert_close(own, whole * F.one_hot(torch.tensor(2), 4))


class Twice(nn.Module):
    """One layer that is called twice."""

    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.cell(torch.tanh(self.cell(x)))))


def test_one_of_several_calls_is_named():
    model, td = Twice(), of(3, 4)
    first = relevance(LRP("epsilon", target=Through(OUTPUT, "cell:0")), model, td)
    second = relevance(LRP("epsilon", target=Through(OUTPUT, "cell:1")), model, td)
    whole = relevance(LRP("epsilon", target=OUTPUT), model, td)
    torch.testing.assert_close(first.sum(1), whole)
    torch.testing.assert_close(second.sum(1), whole)
    assert not torch.allclose(first, second)
    with pytest.raises(ValueError, match=r"'cell' was called 2 times.*'cell:0' is the first"):
        relevance(LRP("epsilon", target=Through(OUTPUT, "cell")), model, td)
    with pytest.raises(ValueError, match=r"'cell' was called 2 times, so that nothing passes 'cell:2'"):
        relevance(LRP("epsilon", target=Through(OUTPUT, "cell:2")), model, td)


def test_operations_are_told_apart_by_order_and_module():
    model, td = Residual(), of(3, 4)
    method = LRP("epsilon")
    last = relevance(method.explaining(Through(OUTPUT, Last(Op("relu")))), model, td)
    torch.testing.assert_close(
        last.sum(1), relevance(method.explaining(Through(OUTPUT, "inside")), model, td).sum(1)
    )
    first = relevance(method.explaining(Through(OUTPUT, First(Op("relu")))), model, td)
    torch.testing.assert_close(first.sum(1), relevance(method.explaining(OUTPUT), model, td))
    with pytest.raises(ValueError, match=r"Op\('relu'\) means 2 operations \(relu, relu\): choose one"):
        relevance(method.explaining(Through(OUTPUT, Op("relu"))), model, td)
    with pytest.raises(ValueError, match=r"performs no operation Op\('gelu'\)"):
        relevance(method.explaining(Through(OUTPUT, Op("gelu"))), model, td)


@pytest.mark.parametrize("method", [LRP("attn_lrp"), GradientTimesInput()], ids=["lrp", "gradient"])
def test_heads_side_by_side_in_what_a_projection_is_given(method):
    model, td = Block(), of(2, 5, 8)
    given = relevance(method.explaining(Through(OUTPUT, "out:input", axis=-1, heads=2)), model, td)
    mixed = relevance(
        method.explaining(Through(OUTPUT, Op("scaled_dot_product_attention"), axis=1)), model, td
    )
    torch.testing.assert_close(given, mixed, rtol=1e-9, atol=1e-12)
    second = relevance(method.explaining(Through(OUTPUT, "cell:input:1")), Twice(), of(3, 4))
    first = relevance(method.explaining(Through(OUTPUT, "cell:input:0")), Twice(), of(3, 4))
    assert second.shape == first.shape == (3, 4, 4)


def test_an_operation_may_be_overwritten_afterwards():
    class InPlace(Residual):
        def forward(self, x):
            h = F.gelu(self.enter(x))
            h += h.flip(-1).detach() * 2 + h.flip(-1)  # its units are mixed
            return self.leave(h)

    model, td = InPlace().double(), of(3, 4)
    found = relevance(GradientTimesInput(Through(OUTPUT, Op("gelu"))), model, td)
    torch.testing.assert_close(found.sum(1), relevance(GradientTimesInput(OUTPUT), model, td))
    x, index = td["input"], model(td["input"]).argmax(-1)
    w1, w3 = model.enter.weight.detach(), model.leave.weight.detach()[index]
    slope = torch.func.vmap(torch.func.vmap(torch.func.grad(F.gelu)))(x @ w1.T)
    torch.testing.assert_close(found, ((w3 + w3.flip(-1)) * slope).unsqueeze(-1) * w1 * x.unsqueeze(1))


class Attending(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head, self.options = nn.Linear(8, 3), options

    def forward(self, x):
        return self.head(self.attention(x, x, x, **self.options)[0]).sum(1)


@pytest.mark.parametrize("method", [LRP("attn_lrp"), GradientTimesInput()], ids=["lrp", "gradient"])
def test_heads_inside_torchs_own_attention(method):
    model, td = Attending(need_weights=False), of(2, 5, 8)
    place = Op("scaled_dot_product_attention")
    each = relevance(method.explaining(Through(OUTPUT, place, axis=1)), model, td)
    assert each.shape == (2, 2, 5, 8)
    torch.testing.assert_close(
        each.sum(1), relevance(method.explaining(OUTPUT), model, td), rtol=0, atol=1e-9
    )


class Experts(nn.Module):
    """Two of three experts for each token, by a gate: ``[batch, tokens, 4] -> [batch, 3]``."""

    def __init__(self):
        super().__init__()
        self.gate, self.head = nn.Linear(4, 3), nn.Linear(4, 3)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3))

    def forward(self, x):
        tokens = x.flatten(0, 1)
        weights = self.gate(tokens).softmax(-1)
        chosen = weights.topk(2, -1).indices
        mixed = torch.zeros_like(tokens)
        for i, expert in enumerate(self.experts):
            rows = (chosen == i).any(-1).nonzero().flatten()
            mixed = mixed.index_add(0, rows, expert(tokens[rows]) * weights[rows, i : i + 1])
        return self.head(mixed.reshape(x.shape)).sum(1)


@pytest.mark.parametrize("batch", [4, 5, 20])
@pytest.mark.parametrize("name", ["epsilon_plus", "attn_lrp", "gradient times input", "integrated gradients"])
def test_experts_and_their_gate_have_all_of_it(name, batch):
    """Layers of tokens, which do not begin with the batch; also where their width is that of the batch."""
    method, model, td = METHODS[name], Experts(), of(batch, 5, 4)
    whole = relevance(method.explaining(OUTPUT), model, td)
    passed = [
        relevance(method.explaining(Through(OUTPUT, f"experts.{i}", (0, 1, 2, 3), axis=-1)), model, td)
        for i in range(3)
    ]
    passed.append(relevance(method.explaining(Through(OUTPUT, "gate", axis=-1)), model, td).sum(1))
    torch.testing.assert_close(sum(passed), whole, rtol=0, atol=1e-9)


def test_of_layers_that_do_not_begin_with_the_batch_units_are_the_same_for_all():
    model, td = Experts().double(), of(3, 5, 4)
    with pytest.raises(
        ValueError, match=r"shape \[15, 3\], which does not begin with the batch, so that units are"
    ):
        relevance(LRP("epsilon", target=Through(OUTPUT, "gate", "top:1")), model, td)
    ledger = explain(LRP("epsilon", target=Through(OUTPUT, "gate", (0, 1)), ledger=True), model, td)["ledger"]
    torch.testing.assert_close(ledger["gap"], torch.zeros(3).double(), rtol=0, atol=1e-9)
    uneven = LRP("epsilon", target=Through(OUTPUT, "experts.0"), ledger=True).wrap(model)

    def chosen(td):
        return int((model.gate(td["input"].flatten(0, 1)).topk(2, -1).indices == 0).any(-1).sum())

    some = next(td for td in (of(11, 1, 4) for _ in range(50)) if 0 < chosen(td) < 11)
    with pytest.raises(
        ValueError, match=r"no ledger can be kept of what passes units of a layer of the shape \[\d+, 4\]"
    ):
        uneven(some)


@pytest.mark.parametrize("rule", [GammaRule(), EpsilonRule(1e-12)], ids=str)
def test_what_a_rule_computes_is_no_operation_of_the_model(rule):
    method = LRP([(nn.Linear, rule)], target=Through(OUTPUT, Last(Op("linear"))))
    with pytest.raises(ValueError, match=r"performs no operation Last\(Op\('linear'\)\)"):
        relevance(method, Residual(), of(3, 4))


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
