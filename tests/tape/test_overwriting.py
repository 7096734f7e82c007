"""Operations that overwrite their argument keep their meaning, and what was needed of it."""

from __future__ import annotations

from operator import imul

import pytest
import torch
from operations.checks import (
    TINY,
    assert_balanced,
    assert_same,
    either_ledger,
    every_flow,
    explained,
    plainly,
    relevance_of,
)
from tensordict import TensorDict
from torch import Tensor, nn

from tdhook import LRP, Target
from tdhook.models.families import Activation
from tdhook.rules import PassRule, ZPlusRule
from tdhook.selectors import Op


class Overwrites(nn.Module):
    """Overwrites its own input."""

    def __init__(self, how) -> None:
        super().__init__()
        self.how = how
        self.head = nn.Linear(6, 2, bias=False, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        self.how(x)
        return self.head(x)


HOW = {
    "relu_": lambda x: x.relu_(),
    "times": lambda x: x.mul_(2.0),
    "minus mean": lambda x: x.sub_(x.mean(-1, keepdim=True)),
    "setitem": lambda x: x.__setitem__((slice(None), 0), x[:, 1]),
    "view": lambda x: x[:, :3].tanh_(),
    "operator": lambda x: x.__iadd__(1.0),
}
PLAIN = {
    "relu_": lambda x: x.relu(),
    "times": lambda x: x * 2.0,
    "minus mean": lambda x: x - x.mean(-1, keepdim=True),
    "setitem": lambda x: torch.cat([x[:, 1:2], x[:, 1:]], 1),
    "view": lambda x: torch.cat([x[:, :3].tanh(), x[:, 3:]], 1),
    "operator": lambda x: x + 1.0,
}


class Returns(nn.Module):
    def __init__(self, model: Overwrites, how) -> None:
        super().__init__()
        self.how, self.head = how, model.head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.how(x))


@every_flow
@either_ledger
@pytest.mark.parametrize("name", HOW)
def test_a_model_that_overwrites_its_input(name: str, flow: str, ledger: bool) -> None:
    torch.manual_seed(0)
    model, x = Overwrites(HOW[name]), torch.randn(3, 6, dtype=torch.float64)
    plain = Returns(model, PLAIN[name])
    given = TensorDict({"input": x.clone()}, batch_size=[3])
    with LRP(TINY, target=Target("output", 0), flow=flow, ledger=ledger, on_unmatched="raise").prepare(
        model
    ) as module:
        for _ in range(2):
            td = module(given)
            assert torch.equal(td["input"], x)
            assert torch.equal(td["output"], plain(x))
    expected, _ = explained(plain, x, flow)
    assert_same(td["attr", "input"], expected["attr", "input"], 1e-12)


@every_flow
@either_ledger
def test_what_a_view_overwrites_is_overwritten_everywhere(flow: str, ledger: bool) -> None:
    def through_views(h: Tensor) -> Tensor:
        window = h.view(-1, 2, 3)[:, 1]
        window.mul_(3.0)
        window[:, 0] = h[:, 0]
        return h

    def written(h: Tensor) -> Tensor:
        return torch.cat([h[:, :3], h[:, :1], h[:, 4:] * 3.0], 1)

    found = relevance_of(through_views, flow, ledger=ledger)
    assert_same(found, relevance_of(written, flow, ledger=ledger), 1e-9)


@every_flow
@either_ledger
def test_values_that_are_overwritten_after_use_are_kept(flow: str, ledger: bool) -> None:
    def f(h: Tensor) -> Tensor:
        product = h * h.flip(-1)
        activated = torch.tanh(h)
        h.zero_()
        return product + activated + h

    def written(h: Tensor) -> Tensor:
        return h * h.flip(-1) + torch.tanh(h)

    assert_same(relevance_of(f, flow, ledger=ledger), relevance_of(written, flow, ledger=ledger), 1e-9)


def _constant(h: Tensor) -> Tensor:
    factor = torch.full((6,), 2.0, dtype=h.dtype)
    scaled = h * factor
    factor.zero_()
    return scaled


def _off_the_tape(h: Tensor) -> Tensor:
    product = torch.tanh(h) * h
    with torch.no_grad():
        h.mul_(0.0)
    return product


def _detached(h: Tensor) -> Tensor:
    product = torch.tanh(h) * h
    h.detach().mul_(0.0)
    return product


HIDDEN = {
    "a constant": (_constant, lambda h: h * 2.0),
    "off the tape": (_off_the_tape, lambda h: torch.tanh(h) * h),
    "detached": (_detached, lambda h: torch.tanh(h) * h),
}


@every_flow
@either_ledger
@pytest.mark.parametrize("before", [lambda h: h, torch.relu_], ids=["alone", "after another"])
@pytest.mark.parametrize("name", HIDDEN)
def test_what_is_overwritten_off_the_tape_is_kept(name: str, before, flow: str, ledger: bool) -> None:
    overwrites, plain = HIDDEN[name]
    found = relevance_of(lambda h: overwrites(before(h)), flow, ledger=ledger)
    expected = relevance_of(lambda h: plain(before(h.clone())), flow, ledger=ledger)
    assert_same(found, expected, 1e-9)


IN_PLACE_MODULES = {
    "sequential": lambda m: nn.Sequential(nn.Linear(6, 6), m, nn.Linear(6, 2)),
    "batch norm": lambda m: nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), m, nn.Linear(6, 2)),
    "twice": lambda m: nn.Sequential(nn.Linear(6, 6), m, nn.Linear(6, 6), m, nn.Linear(6, 2)),
}
COMPOSITES = {"operations": TINY, "modules": [*TINY, (Activation, PassRule())]}


@every_flow
@pytest.mark.parametrize("composite", COMPOSITES.values(), ids=COMPOSITES)
@pytest.mark.parametrize("name", IN_PLACE_MODULES)
def test_layers_that_work_in_place(name: str, composite, flow: str) -> None:
    torch.manual_seed(0)
    models = []
    for inplace in (True, False):
        torch.manual_seed(0)
        models.append(IN_PLACE_MODULES[name](nn.ReLU(inplace=inplace)).double().eval())
    x = torch.randn(3, 6, dtype=torch.float64)
    found = [explained(model, x, flow, composite) for model in models]
    assert torch.equal(found[0][0]["output"], plainly(models[0], x))
    assert_balanced(*found[0])
    assert_same(found[0][0]["attr", "input"], found[1][0]["attr", "input"], 1e-12)
    assert all(m.inplace for m in models[0].modules() if isinstance(m, nn.ReLU))


class Shortcut(nn.Module):
    """Activates in place what its shortcut then uses."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(6, 6), nn.Linear(6, 2)
        self.act = nn.ReLU(inplace=inplace)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x)
        return self.head(self.act(h) + h)


@every_flow
@pytest.mark.parametrize("composite", COMPOSITES.values(), ids=COMPOSITES)
def test_a_layer_in_place_overwrites_what_is_used_again(composite, flow: str) -> None:
    torch.manual_seed(0)
    model, x = Shortcut(True).double(), torch.randn(3, 6, dtype=torch.float64)
    td, module = explained(model, x, flow, composite)
    assert torch.equal(td["output"], plainly(model, x))
    assert_balanced(td, module)


@either_ledger
def test_weights_that_are_overwritten_after_they_were_used(ledger: bool) -> None:
    """Rules that modify the weights of an operation modify those that it computed with."""

    class Fast(nn.Module):
        def __init__(self, *, keeps: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.keeps, self.head = keeps, nn.Linear(5, 2, bias=False).double()
            self.weight = torch.randn(5, 6, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            weight = self.weight.clone()
            y = torch.nn.functional.linear(x, weight.clone() if self.keeps else weight)
            weight.mul_(-1)
            return self.head(y) + y @ weight[:, :2]

    x = torch.randn(3, 6, dtype=torch.float64)
    composite = [(Op("linear"), ZPlusRule()), *TINY]
    found = [
        explained(Fast(keeps=keeps), x, "relevance", composite, ledger=ledger)[0] for keeps in (False, True)
    ]
    assert_same(found[0]["attr", "input"], found[1]["attr", "input"], 1e-9)


ANEW = {
    "in place": lambda x: x.data.mul_(2),
    "by an operator": lambda x: setattr(x, "data", imul(x.data, 2)),
    "copied": lambda x: x.data.copy_(2 * x.detach()),
    "another": lambda x: setattr(x, "data", 2 * x.detach()),
    "without gradients": torch.no_grad()(lambda x: x.data.mul_(2)),
    "not at all": lambda x: None,
}
"""How a model updates what it holds so that torch counts nothing."""


class Updated(nn.Module):
    """A coefficient and weights that are others in the next call, as those of torchrl's KLPENPPOLoss are."""

    def __init__(self, update) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 3), nn.Linear(3, 2)
        self.register_buffer("scale", torch.tensor(2.0))
        self.double()
        self.update = update

    def forward(self, x: Tensor) -> Tensor:
        y = self.last(self.first(x).tanh() * self.scale)
        self.update(self.scale)
        self.update(self.last.weight)
        return y


@every_flow
@either_ledger
@pytest.mark.parametrize("how", ANEW)
def test_what_a_model_updates_uncounted_is_explained_as_it_was(how: str, flow: str, ledger: bool) -> None:
    model, x = Updated(ANEW[how]), torch.randn(3, 4, dtype=torch.float64)
    expected = explained(Updated(ANEW["not at all"]), x, flow, ledger=ledger)[0]
    td, _ = explained(model, x, flow, ledger=ledger)
    assert_same(td["attr", "input"], expected["attr", "input"], 1e-9)
    assert model.scale == (2 if how == "not at all" else 4)
