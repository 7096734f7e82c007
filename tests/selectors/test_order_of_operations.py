"""Selectors of single operations: the first and the last that another selector means."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import nn
from torch.utils.checkpoint import checkpoint

from tdhook import LRP, Target
from tdhook.composites import Composite
from tdhook.rules import EpsilonRule, GammaRule, PassRule, StopRule, UniformRule
from tdhook.selectors import First, Last, Name, Op, Selector


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return torch.tanh(F.relu(self.linear(x)) + x.relu())


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Net().double()


@pytest.fixture
def td():
    torch.manual_seed(1)
    return TensorDict({"input": torch.randn(3, 4).double()}, [3])


def rules_of(pairs, model, td):
    """Of each ``relu``, in the order in which they are performed, the module around it and the rule."""
    plan = LRP(pairs, target=Target("output", 0)).plan(model, td)
    return [(row.path, type(row.rule).__name__) for row in plan if row.operation == "relu"]


PLACES = ["blocks.0", "blocks.0", "blocks.1", "blocks.1"]
CHOICES = {
    "the first": ([(First(Op("relu")), StopRule())], [0]),
    "the last": ([(Last(Op("relu")), StopRule())], [3]),
    "both": ([(First(Op("relu")), StopRule()), (Last(Op("relu")), StopRule())], [0, 3]),
    "the first of a module": ([(First(Op("relu") & Name("blocks.1")), StopRule())], [2]),
    "the first, if it is there": ([(First(Op("relu")) & Name("blocks.1"), StopRule())], []),
    "all but the last": ([(Op("relu") & ~Last(Op("relu")), StopRule())], [0, 1, 2]),
    "the last of any": ([(Last(Op("relu", "tanh")), StopRule())], []),
    "either": ([(First(Op("relu")) | Last(Op("relu")), StopRule())], [0, 3]),
}


@pytest.mark.parametrize("pairs, chosen", CHOICES.values(), ids=list(CHOICES))
def test_one_operation_gets_the_rule(pairs, chosen, model, td):
    expected = [(path, "StopRule" if i in chosen else "PassRule") for i, path in enumerate(PLACES)]
    assert rules_of(pairs, model, td) == expected


@pytest.mark.parametrize("how", [{}, {"compile": {"backend": "aot_eager"}}, {"ledger": True}], ids=str)
def test_its_rule_is_the_one_that_counts(how, model, td):
    """Where the first is stopped, what passes is what the other branch brings."""

    class Stopped(Net):
        def forward(self, x):
            first = self.blocks[0]
            h = torch.tanh(F.relu(first.linear(x)).detach() + x.relu())
            return self.blocks[1](h)

    other = Stopped().double()
    other.load_state_dict(model.state_dict())
    target, linear = Target("output", 0), [(nn.Linear, EpsilonRule())]
    found = LRP([(First(Op("relu")), StopRule()), *linear], target=target, **how).wrap(model)
    for _ in range(2):  # the order is the same in each call
        stopped = found(td.clone())["attr", "input"]
        torch.testing.assert_close(
            stopped, LRP(linear, target=target).wrap(other)(td.clone())["attr", "input"]
        )


def test_layers_that_have_a_rule_are_not_looked_into(model, td):
    pairs = [(Last(Op("linear")), StopRule()), (nn.Linear, EpsilonRule())]
    plan = LRP(pairs, target=Target("output", 0)).plan(model, td)
    assert [type(row.rule).__name__ for row in plan if row.path.endswith("linear")] == ["EpsilonRule"] * 2


def test_order_and_modules_go_together(model, td):
    pairs = [(First(Op("relu")), StopRule()), (First(nn.Linear), GammaRule()), (nn.Linear, EpsilonRule())]
    plan = LRP(pairs, target=Target("output", 0)).plan(model, td)
    kinds = [type(row.rule).__name__ for row in plan if row.path.endswith("linear")]
    assert kinds == ["GammaRule", "EpsilonRule"]
    assert rules_of(pairs, model, td)[0] == ("blocks.0", "StopRule")


def test_they_are_data():
    for selector in (First(Op("relu")), Last(Op("add") & Name("*.1"))):
        assert repr(Selector.from_dict(selector.to_dict())) == repr(selector)


def test_a_module_alone_has_no_order():
    composite = Composite([(First(Op("relu")), StopRule()), (First(nn.Linear), PassRule())])
    with pytest.raises(ValueError, match="depends on the execution order"):
        composite("linear", nn.Linear(2, 2))


def test_operations_that_are_performed_once_more_are_refused(model, td):
    class Again(Net):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=False)

    again = Again().double()
    with pytest.raises(NotImplementedError, match=r"once more on the way back \(checkpointing\)"):
        LRP([(First(Op("relu")), StopRule())], target=Target("output", 0)).wrap(again)(td)
    named = LRP([(Op("relu") & Name("blocks.0"), UniformRule())], target=Target("output", 0)).wrap(again)
    assert named(td)["attr", "input"].isfinite().all()
