"""A run on a reference is kept while nothing changes that it depends on, and one row stands for all where it may."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import Tensor, nn

from tdhook import LRP, Target, preset
from tdhook.rules import EpsilonRule
from tdhook.selectors import Type
from tdhook.targets import as_one

pytestmark = pytest.mark.usefixtures("doubles")


def explained_by(model: nn.Module, baseline: float = 0.5):
    return LRP("deeplift", target=Target("output", 1), baseline=baseline).wrap(model)


def missing(explained, model: nn.Module, x: Tensor, baseline: float = 0.5) -> float:
    """How much of the difference does not arrive."""
    found = explained(TensorDict({"input": x}, [len(x)]))["attr", "input"]
    with torch.no_grad():
        wanted = (model(x) - model(torch.full_like(x, baseline)))[:, 1]
    return float((found.flatten(1).sum(1) - wanted).abs().max())


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


ROWS: list[int] = []
"""How many rows each run has; no part of the model, whose own lists are put back after a run on a reference."""


class Counted(nn.Module):
    """Counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, x: Tensor) -> Tensor:
        ROWS.append(len(x))
        return self.inner(x)


def test_an_unchanged_reference_is_run_once() -> None:
    model = Counted()
    explained = explained_by(model)
    ROWS.clear()
    for _ in range(3):
        assert missing(explained, model.inner, torch.randn(4, 6)) < 1e-12
    # The first call runs it on all rows and on one; later calls run the input alone.
    assert ROWS == [4, 4, 1, 4, 4]


def test_one_row_stands_for_all_when_the_reference_is_run_again() -> None:
    model = Counted()
    explained = explained_by(model)
    assert missing(explained, model.inner, torch.randn(4, 6)) < 1e-12
    with torch.no_grad():
        model.inner[0].weight.add_(0.1)
    ROWS.clear()
    assert missing(explained, model.inner, torch.randn(4, 6)) < 1e-12
    assert ROWS == [4, 1]


@pytest.mark.parametrize("size", [1, 2, 7])
def test_batches_of_another_size(size: int) -> None:
    model = network()
    explained = explained_by(model)
    for count in (4, size, 4):
        assert missing(explained, model, torch.randn(count, 6)) < 1e-12


def in_place(model: nn.Sequential) -> None:
    with torch.no_grad():
        model[0].weight.add_(0.1)


def through_data(model: nn.Sequential) -> None:
    model[0].weight.data.mul_(1.1)


def another_parameter(model: nn.Sequential) -> None:
    model[2].bias = nn.Parameter(torch.randn(8))


def another_layer(model: nn.Sequential) -> None:
    model[3] = nn.Sigmoid()


def an_optimiser(model: nn.Sequential) -> None:
    optimiser = torch.optim.Adam(model.parameters(), 0.1)
    model(torch.randn(3, 6)).sum().backward()
    optimiser.step()


def one_value_through_data(model: nn.Sequential) -> None:
    model[2].weight.data[3, 5] += 1.0


def a_row_of_zeros(model: nn.Sequential) -> None:
    model[2].weight.data[3] = 0.0


def rows_that_change_places(model: nn.Sequential) -> None:
    model[2].weight.data[[3, 6]] = model[2].weight.data[[6, 3]]


def through_numpy(model: nn.Sequential) -> None:
    model[0].bias.detach().numpy()[5] += 1.0


def another_forward(model: nn.Sequential) -> None:
    inner = model[2].forward
    model[2].forward = lambda x: 2 * inner(x)


@pytest.mark.parametrize(
    "change",
    [
        in_place,
        through_data,
        another_parameter,
        another_layer,
        an_optimiser,
        one_value_through_data,
        a_row_of_zeros,
        rows_that_change_places,
        through_numpy,
        another_forward,
    ],
)
def test_what_changes_the_model_is_noticed(change) -> None:
    model = network()
    explained = explained_by(model)
    x = torch.randn(4, 6)
    assert missing(explained, model, x) < 1e-12
    change(model)
    assert missing(explained, model, x) < 1e-12


class Held(nn.Module):
    """Computes with a number, and with a tensor, that it holds without registering them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.number, self.tensors = nn.Linear(6, 3), 2.0, [torch.ones(3)]

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x) / self.number + self.tensors[0])


def test_numbers_and_constants_that_a_model_holds() -> None:
    model = Held()
    explained = explained_by(model)
    x = torch.randn(4, 6)
    assert missing(explained, model, x) < 1e-12
    model.number = 3.0
    assert missing(explained, model, x) < 1e-12
    model.tensors[0] += 1
    assert missing(explained, model, x) < 1e-12
    model.tensors[0] = torch.zeros(3)
    assert missing(explained, model, x) < 1e-12


def test_numbers_that_a_layer_holds() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.LeakyReLU(0.1), nn.Linear(8, 3)).eval()
    model[1].running_mean.normal_()
    explained = explained_by(model)
    x = torch.randn(4, 6)
    assert missing(explained, model, x) < 1e-12
    model[1].eps = 0.5
    assert missing(explained, model, x) < 1e-12
    model[2].negative_slope = 0.7
    assert missing(explained, model, x) < 1e-12
    model[1].running_mean.data[3] += 1.0
    assert missing(explained, model, x) < 1e-12


class Scaled(nn.Module):
    """Computes with whole numbers and a large constant that no module holds."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(6, 200), nn.Linear(200, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.layer(x) * NUMBERS["times"] @ CONSTANTS[0]))


NUMBERS, CONSTANTS = {"times": 2}, [torch.randn(200, 200, dtype=torch.float64)]


def test_whole_numbers_and_large_constants_that_nobody_holds() -> None:
    model = Scaled()
    explained = explained_by(model)
    x = torch.randn(4, 6)
    assert missing(explained, model, x) < 1e-12
    NUMBERS["times"] = 3
    assert missing(explained, model, x) < 1e-12
    CONSTANTS[0][7, 9] += 2.0
    assert missing(explained, model, x) < 1e-12


def test_another_precision_of_what_computes() -> None:
    model = network().float()
    explained = explained_by(model)
    x = torch.randn(4, 6, dtype=torch.float32)
    td = TensorDict({"input": x}, [4])
    explained(td.clone())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, anew = (one(td.clone())["attr", "input"] for one in (explained, explained_by(model)))
    torch.testing.assert_close(found, anew, rtol=0, atol=0)


class Moded(nn.Module):
    """Computes something else in training, by the same calls."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x) * (2 if self.training else 1))


def test_another_mode() -> None:
    model = Moded()
    explained = explained_by(model)
    x = torch.randn(4, 6)
    for training in (True, False, True):
        explained.train(training)
        assert missing(explained, model, x) < 1e-12


def test_what_is_drawn_is_drawn_anew() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 3))
    explained = explained_by(model)
    x = torch.randn(4, 6)
    for seed in range(3):
        torch.manual_seed(seed)
        found = explained(TensorDict({"input": x}, [4]))["attr", "input"].sum(1)
        with torch.no_grad():
            ends = []
            for value in (x, torch.full_like(x, 0.5)):
                torch.manual_seed(seed)
                ends.append(model(value)[:, 1])
        torch.testing.assert_close(found, ends[0] - ends[1])


class Meeting(nn.Module):
    """Its rows meet: each adds up those before it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        made = self.layer(x)
        return torch.tanh(made + 0.1 * made.cumsum(0))


def test_one_row_stands_for_no_other_where_rows_meet() -> None:
    model = Meeting()
    explained = explained_by(model)
    for _ in range(2):
        x = torch.randn(4, 6)
        found = explained(TensorDict({"input": x}, [4]))["attr", "input"].sum()
        with torch.no_grad():
            wanted = (model(x) - model(torch.full_like(x, 0.5)))[:, 1].sum()
        torch.testing.assert_close(found, wanted)


class InOrder(nn.Module):
    """Takes a batch of three rows, in another order, and back."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).index_select(0, torch.tensor([2, 0, 1]))
        return self.last(hidden.tanh()).index_select(0, torch.tensor([1, 2, 0]))


def test_a_model_that_one_row_does_not_suit() -> None:
    """It raises what a user's model may raise, and is run on the whole batch."""
    model = InOrder()
    explained = explained_by(model)
    for _ in range(2):
        assert missing(explained, model, torch.randn(3, 6)) < 1e-9


class Experts(nn.Module):
    """The two best of three experts, by scores that are made of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = nn.Linear(6, 3)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 4), nn.GELU(), nn.Linear(4, 3)) for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.scores(x).softmax(-1).topk(2, -1)
        made = torch.stack([expert(x) for expert in self.experts], 1)
        picked = made.gather(1, chosen.unsqueeze(-1).expand(-1, -1, 3))
        return (weights.unsqueeze(-1) * picked).sum(1)

    def as_chosen(self, x: Tensor, chosen: Tensor) -> Tensor:
        """With the experts that were chosen for another input."""
        weights = self.scores(x).softmax(-1).gather(-1, chosen)
        made = torch.stack([expert(x) for expert in self.experts], 1)
        picked = made.gather(1, chosen.unsqueeze(-1).expand(-1, -1, 3))
        return (weights.unsqueeze(-1) * picked).sum(1)


@pytest.mark.parametrize("flow", ["relevance", "gradient"])
def test_other_experts_on_the_reference(flow: str) -> None:
    """The reference is run with the decisions of the input, of which one warning tells."""
    model = Experts()
    x, start = torch.randn(8, 6), torch.randn(6)
    chosen = model.scores(x).topk(2, -1).indices
    assert not torch.equal(chosen, model.scores(start).topk(2, -1).indices.expand_as(chosen))
    lrp = LRP("deeplift", target=Target("output", 1), baseline=start, flow=flow, ledger=True)
    with lrp.prepare(model) as explained:
        with pytest.warns(
            UserWarning, match="gather moves other values there.*with the decisions that it takes"
        ):
            td = explained(TensorDict({"input": x}, [8]))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            explained(TensorDict({"input": x}, [8]))
    with torch.no_grad():
        wanted = (model(x) - model.as_chosen(start.expand_as(x), chosen))[:, 1]
    torch.testing.assert_close(td["attr", "input"].sum(1), wanted)
    assert td["ledger", "gap"].abs().max() < 1e-12


AROUND: dict[str, object] = {}
"""What modules read that is nowhere in them."""


class FromAround(nn.Module):
    """Under a rule of its own, so that nothing looks at the functions inside it."""

    def forward(self, x: Tensor) -> Tensor:
        large = (torch.tanh(x @ AROUND["wide"]) @ AROUND["back"]) if "wide" in AROUND else 0.0
        return torch.tanh(x @ AROUND["weight"] + AROUND["shift"]) + large


@as_one
def from_around(x: Tensor) -> Tensor:
    return torch.tanh(x @ AROUND["weight"] + AROUND["shift"])


class AsOne(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return from_around(x)


class ScaledWeight(nn.Module):
    """Its weight is made in each call, of a parameter and of what nothing holds."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.inner.weight * AROUND["weight"]).tanh()


@pytest.mark.parametrize("change", ["weight", "shift", "wide", "back"])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("kind", [FromAround, AsOne, ScaledWeight])
def test_what_a_unit_reads_that_nothing_holds(kind: type[nn.Module], in_place: bool, change: str) -> None:
    AROUND.update(
        weight=torch.randn(6, 6) / 6, shift=0.5, wide=torch.randn(6, 4000), back=torch.randn(4000, 6)
    )
    model = nn.Sequential(kind(), nn.Linear(6, 3))
    composite = [(Type(FromAround), EpsilonRule(1e-9)), *preset("deeplift")]
    explained = LRP(composite, target=Target("output", 1), baseline=0.5).wrap(model)
    for _ in range(2):
        assert missing(explained, model, torch.randn(4, 6)) < 1e-6
    if in_place and isinstance(AROUND[change], Tensor):
        AROUND[change].mul_(1.5)
    else:
        AROUND[change] = AROUND[change] * 1.5
    for _ in range(2):
        assert missing(explained, model, torch.randn(4, 6)) < 1e-6


def test_a_unit_that_reads_the_same_is_run_once_on_the_reference() -> None:
    class Rows(FromAround):
        def forward(self, x: Tensor) -> Tensor:
            ROWS.append(len(x))
            return super().forward(x)

    AROUND.update(weight=torch.randn(6, 6), shift=0.5)
    model = nn.Sequential(Rows(), nn.Linear(6, 3))
    composite = [(Type(Rows), EpsilonRule(1e-9)), *preset("deeplift")]
    explained = LRP(composite, target=Target("output", 1), baseline=0.5).wrap(model)
    ROWS.clear()
    for _ in range(3):
        explained(TensorDict({"input": torch.randn(4, 6)}, [4]))
    assert ROWS.count(1) == 1
