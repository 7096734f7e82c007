"""The books of a ledger: each element's own where elements can be told apart, the batch's where they meet."""

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from tdhook import LRP, Target
from tdhook.rules import EpsilonRule, IgnoreRule
from tdhook.selectors import Op

FLOWS = ("relevance", "gradient")
FEW, MANY = (2, 3, 5, 7, 32), (33, 130, 257)


class Around(nn.Module):
    """A function between two layers, on ``[B, 4]``."""

    def __init__(self, function, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 6, dtype=dtype), nn.Linear(6, 2, dtype=dtype)
        self.function = function

    def forward(self, x):
        return self.last(self.function(self.first(x)))


class Attending(nn.Module):
    """Self-attention with a mask that is added, one row of which masks all, on ``[B, 3, 4]``."""

    def __init__(self, least, dtype):
        super().__init__()
        torch.manual_seed(1)
        self.queries, self.head = nn.Linear(4, 4, dtype=dtype), nn.Linear(4, 2, dtype=dtype)
        masked = torch.tensor([[1, 1, 1], [0, 0, 1], [0, 0, 0]]).bool()
        self.mask = torch.zeros(3, 3, dtype=dtype).masked_fill(masked, least)

    def forward(self, x):
        attended = (self.queries(x) @ x.mT + self.mask).softmax(-1) @ x
        return self.head(attended.mean(1))


class TimeFirst(nn.Module):
    """A recurrent network that moves the axis of time in front, on ``[B, T, 4]``."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.cell, self.head = nn.GRU(4, 5).double(), nn.Linear(5, 2).double()

    def forward(self, x):
        return self.head(self.cell(x.transpose(0, 1))[0][-1])


class Ragged(nn.Module):
    """Rows of as many steps as there are, all in one, on ``[B, T, 4]``."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 5).double(), nn.Linear(5, 2).double()

    def forward(self, x):
        there = torch.arange(x.shape[1]) <= torch.arange(len(x))[:, None] % x.shape[1]
        steps = self.first(x[there]).tanh()
        return self.last(torch.zeros(len(x), 5, dtype=x.dtype).index_add(0, there.nonzero()[:, 0], steps))


class Members(nn.Module):
    """The members of an ensemble, by ``torch.vmap``, on ``[B, 4]``."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.weight, self.head = nn.Parameter(torch.randn(3, 5, 4).double()), nn.Linear(15, 2).double()

    def forward(self, x):
        members = torch.vmap(lambda weight: nn.functional.linear(x, weight).tanh())(self.weight)
        return self.head(members.permute(1, 0, 2).flatten(1))


def shuffled(h):
    order = torch.randperm(len(h), generator=torch.Generator().manual_seed(1))
    return h[order].tanh()[order.argsort()]


class Counting(EpsilonRule):
    """Counts backward passes."""

    def __init__(self):
        super().__init__()
        self.passes = 0

    def propagate(self, step, relevance):
        self.passes += 1
        return super().propagate(step, relevance)


MEETING = {
    "centred": lambda h: h.tanh() - h.tanh().mean(0),
    "attention": lambda h: (h @ h.mT / 2).softmax(-1) @ h,
    "neighbours": lambda h: h + 0.5 * h.flip(0).tanh(),
    "sums so far": lambda h: h.cumsum(0),
    "the greatest": lambda h: h - h.max(0).values,
    "one pair": lambda h: h + torch.cat([0.3 * h[-1:], 0 * h[1:]]),
}
APART = {
    "rows": (lambda: Around(torch.tanh), (4,)),
    "columns": (lambda: Around(lambda h: h.mT.tanh().mul(2).mT), (4,)),
    "shuffled": (lambda: Around(shuffled), (4,)),
    "scaled by statistics": (lambda: Around(lambda h: h / (h.detach().std(0, correction=0) + 1e-3)), (4,)),
    "time first": (TimeFirst, (6, 4)),
    "ragged": (Ragged, (6, 4)),
    "members": (Members, (4,)),
}


def numbers(*shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)


def explain(model, x, composite="epsilon_plus", batch=None, target=0, **options):
    td = TensorDict(input=x, batch_size=x.shape[:1] if batch is None else batch)
    explained = LRP(composite, target=Target("output", target), ledger=True, **options).wrap(model)
    return explained(td), explained


def assert_closes(td, tolerance=1e-12):
    book = td["ledger"]
    size = max(book[name].abs().max() for name in ("target", "inputs", "absorbed"))
    assert (book["gap"].abs() <= tolerance * size).all()
    torch.testing.assert_close(book["target"], book["inputs"] + book["absorbed"] + book["gap"])
    torch.testing.assert_close(book["inputs"].sum(), td["attr", "input"].sum(), rtol=1e-9, atol=1e-11)


class One(nn.Module):
    """A model of which all outputs but those of one element are zero."""

    def __init__(self, model, element):
        super().__init__()
        self.model, self.element = model, element

    def forward(self, x):
        output = self.model(x)
        return torch.cat(
            [0 * output[: self.element], output[self.element :][:1], 0 * output[self.element + 1 :]]
        )


def inputs_of_one(model, x, element, **options):
    """What arrives at all inputs when nothing but one element is explained."""
    lrp = LRP("epsilon_plus", target=Target("output", 0), **options)
    return lrp.wrap(One(model, element))(TensorDict(input=x, batch_size=x.shape[:1]))["attr", "input"].sum()


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("count", FEW)
@pytest.mark.parametrize("name", MEETING)
def test_few_elements_that_meet_have_each_its_own_account(name, count, flow):
    model, x = Around(MEETING[name]), numbers(count, 4)
    td, explained = explain(model, x, flow=flow)
    assert explained.ledger.per_element
    assert_closes(td)
    for element in {0, count // 2, count - 1}:
        expected = inputs_of_one(model, x, element, flow=flow)
        torch.testing.assert_close(td["ledger", "inputs"][element], expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("count", MANY)
@pytest.mark.parametrize("name", MEETING)
def test_many_elements_that_meet_have_the_account_of_the_batch(name, count, flow):
    td, explained = explain(Around(MEETING[name]), numbers(count, 4), flow=flow)
    assert not explained.ledger.per_element
    assert_closes(td)
    torch.testing.assert_close(td["ledger", "target"], td["output"][:, 0])
    assert len(td["ledger", "absorbed"].unique()) <= 2  # shares, not what each element has
    assert not any(entry.opens() for entry in explained.ledger.summary())


@pytest.mark.parametrize("count", [3, 64])
def test_batch_normalisation_in_training(count):
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2)).double()
    td, _ = explain(model, numbers(count, 4))
    assert_closes(td)


@pytest.mark.parametrize("power", range(0, 13, 2))
def test_weak_coupling_is_not_missed(power):
    model = Around(lambda h: h.tanh() + 10.0**-power * h.mean(0))
    td, explained = explain(model, numbers(40, 4))
    assert not explained.ledger.per_element
    td, explained = explain(model, numbers(3, 4))
    assert_closes(td)
    passes = {entry.name: entry for entry in explained.ledger.entries}
    foreign = passes["mean()"].of("arrived").abs().max()
    assert foreign > 0
    for element in range(3):
        expected = inputs_of_one(model, numbers(3, 4), element)
        torch.testing.assert_close(td["ledger", "inputs"][element], expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("count", [1, 3, 40])
@pytest.mark.parametrize("name", APART)
def test_elements_are_told_apart_wherever_they_lie(name, count, flow):
    make, shape = APART[name]
    model, x = make(), numbers(count, *shape)
    td, explained = explain(model, x, flow=flow)
    assert explained.ledger.per_element
    assert_closes(td)
    own = td["attr", "input"].flatten(1).sum(1)
    torch.testing.assert_close(td["ledger", "inputs"], own, rtol=1e-9, atol=1e-11)


def test_elements_are_told_apart_where_there_are_as_many_steps_as_elements():
    td, explained = explain(TimeFirst(), numbers(6, 6, 4), "lstm_lrp")
    assert explained.ledger.per_element
    assert_closes(td)
    torch.testing.assert_close(td["ledger", "inputs"], td["attr", "input"].sum((1, 2)), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("shape", [(2, 3), (2, 1, 3), (5, 8), (1, 1)], ids=str)
@pytest.mark.parametrize("axis", [0, -2])
def test_nested_batches_that_meet(shape, axis):
    model = Around(lambda h: h - h.mean(axis, keepdim=True))
    td, explained = explain(model, numbers(*shape, 4), batch=shape)
    assert td["ledger", "gap"].shape == shape
    assert explained.ledger.per_element == (shape != (5, 8))
    assert_closes(td)


@pytest.mark.parametrize("count", [3, 40])
@pytest.mark.parametrize("budget", [None, 1])
def test_several_targets_that_meet(count, budget):
    td, explained = explain(Around(MEETING["centred"]), numbers(count, 4), target="all", memory_budget=budget)
    assert td["ledger", "gap"].shape == (count, 2) and explained.ledger.per_element == (count == 3)
    assert (td["ledger", "gap"].abs() < 1e-13).all()
    torch.testing.assert_close(
        td["ledger", "inputs"].sum(0), td["attr", "input"].sum((0, 2)), rtol=1e-9, atol=1e-11
    )


def test_gaps_of_a_batch_are_seen_even_where_they_add_up_to_nothing():
    wrong = [(Op("add"), IgnoreRule()), (nn.Linear, EpsilonRule())]
    model = nn.Sequential(Around(lambda h: h + h.sin()), Centred())
    td, explained = explain(model, numbers(64, 4), wrong, flow="relevance")
    gap = td["ledger", "gap"]
    assert not explained.ledger.per_element
    assert gap.sum().abs() < 1e-6
    assert gap.abs().max() > 1e-3 * td["ledger", "target"].abs().max()
    assert {entry.name for entry in explained.ledger.summary() if entry.opens()} == {"add()"}


class Centred(nn.Module):
    """Takes the mean of the batch off."""

    def forward(self, x):
        return x - x.mean(0)


@pytest.mark.parametrize(
    "dtype, count, meets, passes",
    [
        (torch.float32, 1, False, 1),
        (torch.float32, 160, False, 2),
        (torch.float32, 161, False, 3),
        (torch.float32, 20_000, False, 3),
        (torch.float64, 20_000, False, 3),
        (torch.bfloat16, 20_000, False, 3),
        (torch.float32, 32, True, 2 + 32),
        (torch.float32, 20_000, True, 3),
    ],
)
def test_it_takes_a_few_backward_passes(dtype, count, meets, passes):
    rule = Counting()
    model = Around((lambda h: h - h.mean(0)) if meets else torch.relu, dtype)
    _, explained = explain(model, numbers(count, 4, dtype=dtype), [(nn.Linear, rule)], flow="relevance")
    layers = 2
    assert rule.passes == layers * (1 + passes)
    assert explained.ledger.per_element == (not meets or count == 32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("composite", ["attn_lrp", "epsilon_plus", "cp_lrp"])
@pytest.mark.parametrize("flow", [*FLOWS, None])
def test_the_least_number_masks(composite, flow, dtype):
    model = Attending(torch.finfo(dtype).min, dtype)
    td, explained = explain(model, numbers(2, 3, 4, dtype=dtype), composite, flow=flow)
    target = td["ledger", "target"].abs().max()
    assert (td["ledger", "gap"].abs() < 1e3 * torch.finfo(dtype).eps * target).all()
    assert (td["ledger", "absorbed"].abs() < 10 * target).all()
    assert not any(entry.opens() for entry in explained.ledger.summary())


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("value", [torch.finfo(torch.float64).max, -torch.finfo(torch.float64).max])
def test_values_that_mask_as_inputs_and_targets(flow, value):
    x = numbers(3, 4)
    x[0, 0] = value
    model = nn.Sequential(nn.Tanh(), nn.Linear(4, 2).double())
    td, _ = explain(model, x, flow=flow)
    assert (td["ledger", "gap"].abs() < 1e-12).all()
    torch.testing.assert_close(td["ledger", "inputs"], td["attr", "input"].sum(1))
    masked = Around(lambda h: h)
    masked.function = lambda h: h + torch.tensor([0, 0, value, 0, 0, 0], dtype=torch.float64)
    td, _ = explain(nn.Sequential(masked.first, Masked(value)), numbers(3, 4), flow=flow)
    assert (td["ledger", "gap"].abs() < 1e-12).all()
    assert (td["ledger", "target"] == value).all()


class Masked(nn.Module):
    """The first of the logits is masked."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x):
        return x + torch.tensor([self.value] + [0.0] * (x.shape[-1] - 1), dtype=x.dtype)


@pytest.mark.parametrize("count", [2, 5, 40])
def test_what_is_not_a_number_stays_with_its_element(count):
    class Logarithms(nn.Module):
        def forward(self, x):
            return torch.where(x > 0, x.log(), x)

    x = numbers(count, 4).abs()
    x[1] *= -1
    td, explained = explain(nn.Sequential(Logarithms(), nn.Linear(4, 2).double()), x, flow="gradient")
    assert explained.ledger.per_element
    others = torch.arange(count) != 1
    assert td["ledger", "gap"].shape == (count,) and (td["ledger", "gap"][others].abs() < 1e-12).all()
    assert td["ledger", "gap"][1].isfinite() == td["attr", "input"][1].isfinite().all()


@pytest.mark.parametrize("count", [2, 3, 64])
def test_a_row_that_masks_all_and_that_nobody_reads(count):
    class Unread(Attending):
        def forward(self, x):
            attended = (self.queries(x) @ x.mT + self.mask).softmax(-1) @ x
            return self.head(attended[:, 1:].mean(1))

    td, _ = explain(Unread(-torch.inf, torch.float64), numbers(count, 3, 4), "attn_lrp")
    assert td["ledger", "gap"].shape == (count,)
    attr = td["attr", "input"].isfinite().flatten(1).all(1)
    assert torch.equal(td["ledger", "gap"].isfinite(), attr)  # as finite as what is accounted for


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("count", [1, 3, 40])
@pytest.mark.parametrize("function", [torch.tanh, lambda h: h - h.mean(0)], ids=["apart", "meeting"])
def test_another_default_device(function, count, flow):
    model, x = Around(function), numbers(count, 4)
    expected, _ = explain(model, x, flow=flow)
    torch.set_default_device("meta")  # where nothing can be computed
    try:
        td, _ = explain(model, x, flow=flow)
    finally:
        torch.set_default_device(None)
    for name in ("target", "inputs", "absorbed", "gap"):
        assert torch.equal(td["ledger", name], expected["ledger", name])


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("count", [1, 5, 300])
def test_gaps_are_judged_by_what_the_precision_allows(dtype, count, flow):
    x = numbers(count, 4, dtype=dtype)
    td, explained = explain(Around(torch.tanh, dtype), x, flow=flow)
    assert explained.ledger.per_element
    arrived = max(entry.of("arrived").abs().max() for entry in explained.ledger.entries)
    assert (td["ledger", "gap"].abs() <= 8 * torch.finfo(dtype).eps * arrived).all()
    assert not any(entry.opens() for entry in explained.ledger.summary())
    wrong = [(Op("add"), IgnoreRule()), (nn.Linear, EpsilonRule())]
    _, explained = explain(Around(lambda h: h + h.tanh(), dtype), x, wrong, flow="relevance")
    assert {entry.name for entry in explained.ledger.summary() if entry.opens()} == {"add()"}


@pytest.mark.parametrize("modules", [["embed"], ["embed", "inner"], ["inner", "embed"]], ids=str)
@pytest.mark.parametrize("count", [3, 40])
def test_relevance_ends_at_embeddings_once(modules, count):
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.inner = nn.Embedding(10, 4).double(), nn.Linear(4, 4).double()
            self.head = nn.Linear(4, 2).double()

        def forward(self, x):
            return self.head(self.inner(self.embed(x)).tanh().mean(1))

    td = TensorDict(input=torch.arange(count * 6).reshape(count, 6) % 10, batch_size=[count])
    lrp = LRP(
        "epsilon_plus", target=Target("output", 0), ledger=True, use_inputs=False, input_modules=modules
    )
    td = lrp.wrap(Tokens())(td)
    assert (td["ledger", "gap"].abs() < 1e-13).all()
    torch.testing.assert_close(td["ledger", "inputs"], td["attr", "embed"].sum((1, 2)))


class Both(nn.Module):
    """Reads numbers and tokens; a copy of the numbers is handed on as it is."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.same = nn.Embedding(10, 4).double(), nn.Identity()
        self.inner, self.head = nn.Linear(4, 4).double(), nn.Linear(4, 2).double()

    def forward(self, x, tokens):
        return self.head(self.inner(self.same(x) + self.embed(tokens)).tanh())


@pytest.mark.filterwarnings("ignore:input 'tokens' is torch.int64")
@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("modules", [["embed"], ["embed", "inner"], ["same", "embed"], ["inner"]], ids=str)
def test_relevance_ends_at_inputs_and_embeddings_once(modules, flow):
    td = TensorDict(x=numbers(6, 4), tokens=torch.arange(6), batch_size=[6])
    lrp = LRP("epsilon_plus", target=Target("output", 0), flow=flow, ledger=True, input_modules=modules)
    td = lrp.wrap(Both(), in_keys=["x", "tokens"], out_keys=["output"])(td)
    book = td["ledger"]
    arrived = td["attr", "x"].sum(1)
    if "embed" in modules:
        arrived = arrived + td["attr", "embed"].sum(1)
    torch.testing.assert_close(book["inputs"], arrived)
    assert (book["gap"].abs() < 1e-13).all()


def test_an_empty_batch_is_refused():
    with pytest.raises(ValueError, match="the TensorDict is empty"):
        explain(Around(torch.tanh), numbers(0, 4))
