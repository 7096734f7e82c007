"""Through: layers, heads, keys, calls and operations as places."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from passing import METHODS, OUTPUT, Block, Residual, explain, of, relevance
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn

from tdhook.attribution import (
    LRP,
    GradientTimesInput,
)
from tdhook.rules import EpsilonRule, GammaRule
from tdhook.selectors import First, Last, Op
from tdhook.targets import Target, Through


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


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
