"""Own tapes are pulled back from where they ended to where they began, whatever is overwritten afterwards."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from tdhook import LRP, Target
from tdhook.rules import EpsilonRule, NormRule
from tdhook.tape.dependence import leaf
from tdhook.tape.own import OwnTape


def test_what_is_overwritten_afterwards_does_not_matter():
    x = torch.tensor([1.0, 2.0, 3.0])
    begun = leaf(x)
    z = begun * 3
    tape = OwnTape([begun], [z])
    x.add_(1)  # the memory of the leaf, whose place on the tape is another one from now on
    (found,) = tape.pull([torch.ones(3)])
    assert found.tolist() == [3, 3, 3]
    assert torch.autograd.grad(z.sum(), begun, allow_unused=True) == (None,)  # what a tensor would say


def test_a_view_that_is_overwritten_ends_where_it_was():
    x = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    base = 2 * x
    view = base[:2]
    tape = OwnTape([x], [view])
    base.mul_(5)
    assert tape.pull([torch.ones(2)])[0].tolist() == [2, 2, 0]


def test_constants_and_what_nothing_depends_on():
    x, other = torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)
    tape = OwnTape([x, torch.ones(2), other], [3 * x, torch.ones(1)])
    grads = [torch.ones(2), torch.ones(1)]
    assert [None if g is None else g.tolist() for g in tape.pull(grads)] == [[3, 3], None, None]
    assert [None if g is None else g.tolist() for g in tape.pull(grads, zeros=True)] == [
        [3, 3],
        None,
        [0, 0, 0],
    ]
    assert OwnTape([x], [torch.ones(1)]).pull([torch.ones(1)], zeros=True) == (None,)
    assert len(list(tape.nodes)) == 1


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grad


class Applies(nn.Module):
    def forward(self, x):
        return Cube.apply(x)


def doubled(h, z):
    return z + h.mul_(2), lambda h, z: z + 2 * h


def moved(h, z):
    h.add_(z)
    return z + h, lambda h, z: z + (h + z)


def unread(h, z):
    h.zero_()
    return z, lambda h, z: z


class Overwrites(nn.Module):
    """Overwrites what a unit was given, or does the same out of place."""

    def __init__(self, unit, way, in_place):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.unit, self.head = nn.Linear(4, 4), unit, nn.Linear(4, 2)
        self.way, self.in_place = way, in_place

    def forward(self, x):
        h = self.first(x)
        z = self.unit(h)
        if self.in_place:
            return self.head(self.way(h, z)[0])
        plain = self.way(h.detach().clone(), z.detach().clone())[1]
        return self.head(plain(h, z))


UNITS = {"a function": Applies, "a norm": lambda: nn.LayerNorm(4), "softmax": lambda: nn.Softmax(-1)}


@pytest.mark.parametrize("flow", ["relevance", "gradient"])
@pytest.mark.parametrize("rule", [None, EpsilonRule(1e-9), NormRule()])
@pytest.mark.parametrize("way", [doubled, moved, unread])
@pytest.mark.parametrize("unit", UNITS)
def test_units_whose_input_is_overwritten_afterwards(unit, way, rule, flow):
    found = []
    for in_place in (True, False):
        model = Overwrites(UNITS[unit](), way, in_place).double()
        torch.manual_seed(1)
        td = TensorDict(x=torch.randn(3, 4).double(), batch_size=[3])
        rules = [] if rule is None else [("unit", rule)]
        lrp = LRP(
            [*rules, (nn.Linear, EpsilonRule(1e-12))], target=Target("y", 0), flow=flow, ledger=rule is None
        )
        explained = lrp.wrap(TensorDictModule(model, ["x"], ["y"]))
        found += [explained(td.copy())["attr", "x"] for _ in range(2)]
    for other in found[1:]:
        torch.testing.assert_close(found[0], other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("ledger", [True, False])
@pytest.mark.parametrize("flow", ["relevance", "gradient"])
def test_a_function_that_is_elementwise_passes_relevance_on(flow, ledger):
    class Model(nn.Module):
        def forward(self, x):
            z = Cube.apply(x)
            x.add_(x.clone())
            return z

    x = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64)
    lrp = LRP([(nn.Linear, EpsilonRule())], target=Target("output", 1), flow=flow, ledger=ledger)
    found = lrp.wrap(Model())(TensorDict({"input": x}, batch_size=[1]))["attr", "input"]
    torch.testing.assert_close(found, torch.tensor([[0.0, 8.0, 0.0]], dtype=torch.float64))
