"""Rows of values inside a model are taken for elements of the batch where they are, and nowhere else."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from tdhook import LRP, Target
from tdhook.attribution import GradientTimesInput, Patching
from tdhook.selectors import Op
from tdhook.targets import Key, Through


class Sorting(nn.Module):
    """Sorts its batch, as networks do with sequences by their lengths, and puts it back in order."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        order = self.order(x)
        hidden = self.first(x[order]).tanh()
        return self.last(hidden[order.argsort()])

    def order(self, x: Tensor) -> Tensor:
        return x[..., 0].argsort()


class Turned(Sorting):
    """Turns its batch round."""

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x.flip(0)).tanh().flip(0))


class Straight(Sorting):
    """The same without that."""

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).tanh())


class Routed(nn.Module):
    """Hands tokens to one of two experts."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 5) for _ in range(2))
        self.last = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        made = tokens.new_zeros(len(tokens), 5)
        for one, expert in enumerate(self.experts):
            rows = (tokens[:, 0] > 0) == bool(one)
            made = made.index_put((rows,), expert(tokens[rows]).tanh())
        return self.last(made.unflatten(0, x.shape[:2]).sum(1))


class Picking(nn.Module):
    """Sorts features, takes the last step of each element, and mixes steps of trajectories."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x.sort(-1).values).tanh()
        hidden = torch.cat([hidden[:1], hidden[:-1]]) + hidden
        wide = torch.stack([hidden, hidden.sin()], 1)
        last = wide[torch.arange(len(x)), torch.arange(len(x)) % 2]
        return self.last(last.gather(-1, torch.arange(5).expand(len(x), 5)))


OUTPUT = Target("output", 1)
ASKING = {
    "relevance of a layer": LRP("epsilon", target=OUTPUT, input_modules=["first"]),
    "its values": LRP("epsilon", target=OUTPUT, values=["first"]),
    "what it gives": GradientTimesInput(Target(("first",), 0), target_modules=["first"]),
    "units of each element": GradientTimesInput(Through(OUTPUT, "first", Key("unit"))),
    "the largest units": LRP("epsilon", target=Through(OUTPUT, "first", "top:2")),
    "units of an operation": LRP("epsilon", target=Through(OUTPUT, Op("tanh"), "top:2")),
    "effects": Patching("exact", OUTPUT, at=["first"]),
    "effects of an operation": Patching("atp", OUTPUT, at=[Op("tanh")]),
}


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def of(x: Tensor) -> TensorDict:
    unit = torch.arange(len(x)) % 5
    sides = {"clean": {"input": x}, "corrupt": {"input": x.flip(0) * 2}}
    return TensorDict({"input": x, "unit": unit, **sides}, [len(x)])


@pytest.mark.parametrize("method", ASKING.values(), ids=ASKING.keys())
def test_elements_that_a_model_sorts_are_told(method):
    with pytest.raises(ValueError, match=r"are not the elements of the batch \[4\] at their own places"):
        method.wrap(Sorting().double())(of(torch.randn(4, 4).double()))


def test_so_are_those_that_it_turns_round_and_those_that_an_expert_is_given():
    method = LRP("epsilon", target=OUTPUT, input_modules=["first"])
    with pytest.raises(ValueError, match="'first' gives a tensor of shape"):
        method.wrap(Turned().double())(of(torch.randn(4, 4).double()))
    x = torch.randn(3, 2, 4).double()
    x[..., 0] = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]])  # three tokens of two elements
    with pytest.raises(ValueError, match=r"'experts\.1' gives a tensor of shape"):
        GradientTimesInput(Through(OUTPUT, "experts.1", "top:1")).wrap(Routed().double())(of(x))


def test_a_layer_as_wide_as_the_batch_is_not_taken_to_lie_across():
    """What the first element depends on is a part of each column, and of one row that is not the first."""
    for seed in range(3):
        torch.manual_seed(seed)
        x = torch.randn(5, 4).double()
        x[:, 0] = torch.tensor([0.4, 0.5, 0.3, 0.2, 0.1])
        with pytest.raises(ValueError, match=r"are not the elements of the batch \[5\] at their own places"):
            ASKING["relevance of a layer"].wrap(Sorting().double())(of(x))


def test_units_that_are_the_same_for_all_elements_may_lie_elsewhere():
    model, td = Sorting().double(), of(torch.randn(4, 4).double())
    straight = Straight().double()
    straight.load_state_dict(model.state_dict())
    method = LRP("epsilon", target=Through(OUTPUT, "first", "all"), ledger=True)
    found, expected = (method.wrap(one)(td.copy()) for one in (model, straight))
    torch.testing.assert_close(found["attr", "input"], expected["attr", "input"])
    torch.testing.assert_close(found["ledger", "gap"], torch.zeros(4, 5).double(), rtol=0, atol=1e-12)


def test_each_call_is_looked_at():
    """A batch may come in order, and the next one not."""
    explained = ASKING["relevance of a layer"].wrap(Sorting().double())
    x = torch.randn(4, 4).double()
    assert explained(of(x[x[:, 0].argsort()]))["attr", "first"].shape == (4, 5)
    x[:, 0] = torch.tensor([0.4, 0.3, 0.2, 0.1])
    with pytest.raises(ValueError, match="at their own places"):
        explained(of(x))


def test_what_picks_other_things_than_elements_is_none_of_it():
    model, x = Picking().double(), torch.randn(4, 4).double()
    hidden = model.first(x.sort(-1).values).detach().requires_grad_()
    shifted = torch.cat([hidden[:1], hidden[:-1]]).tanh() + hidden.tanh()
    odd = (torch.arange(4) % 2 == 1).unsqueeze(-1)
    value = model.last(torch.where(odd, shifted.sin(), shifted))[:, 1].sum()
    (gradient,) = torch.autograd.grad(value, hidden)
    method = GradientTimesInput(OUTPUT, input_modules=["first"])
    torch.testing.assert_close(
        method.wrap(model)(of(x))["attr", "first"], gradient * hidden.detach(), rtol=1e-12, atol=1e-12
    )
