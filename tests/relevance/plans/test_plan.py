"""Plans: what is asked before anything runs, and what a run tells."""

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn

from tdhook import LRP, Target
from tdhook.relevance.plans.making import select
from tdhook.rules import EpsilonRule, IgnoreRule, PassRule
from tdhook.selectors import First, Last, Reads, Type, Writes


class Reversed(nn.Module):
    """Runs its layers in another order than it registers them, and one of them not at all."""

    def __init__(self):
        super().__init__()
        self.last, self.idle, self.first = nn.Linear(4, 2), nn.Linear(4, 4), nn.Linear(3, 4)
        self.act = nn.Tanh()

    def forward(self, x):
        return self.last(self.act(self.first(x)))


def data():
    return TensorDict(input=torch.randn(5, 3), batch_size=[5])


def test_a_plan_says_what_runs():
    lrp = LRP([(nn.Linear, EpsilonRule())])
    guess, seen = lrp.plan(Reversed()), lrp.plan(Reversed(), data())
    assert [row.path for row in guess] == ["", "last", "idle", "first", "act"]
    assert all(row.runs for row in guess)
    assert [row.path for row in seen if row.runs] == ["first", "act", "last"]
    assert [row.path for row in seen if not row.runs] == ["idle"]
    assert "idle    Linear  EpsilonRule()  relevance   Type(Linear) (never called)" in str(seen)
    assert "act     tanh()  PassRule()     relevance   default" in str(seen)
    assert {row.path: row.rule for row in seen}["act"] == PassRule()
    assert [row.operation for row in seen] == [None, "tanh", None, None]


def test_a_plan_lists_operations():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x):
            h = x + self.inner(x).relu()
            return self.head(h.unsqueeze(0).amax(0)), torch.fft.rfft(h).real

    plan = LRP("epsilon_plus", on_unmatched="ignore").plan(Block(), data(), out_keys=["a", "b"])
    lines = [" ".join(line.split()) for line in str(plan).splitlines()[2:]]
    assert lines == [
        "inner Linear EpsilonRule() relevance Type(Linear)",
        "(model) relu() PassRule() relevance default",
        "(model) add() EpsilonRule(epsilon=rounding) relevance default",
        "(model) unsqueeze() moves data",
        "(model) amax() picks values",
        "head Linear EpsilonRule() relevance Type(Linear)",
        "(model) fft_rfft() EpsilonRule(epsilon=rounding) relevance default",
        "(model) real() moves data",
    ]


def test_a_selector_can_be_looked_at():
    model = Reversed()
    assert list(select(Type(nn.Linear), model, data())) == ["first", "last", "idle"]
    assert select(First(Type(nn.Linear)), model) == {"last": model.last}
    assert select(First(Type(nn.Linear)), model, data()) == {"first": model.first}
    assert select(Last(Type(nn.Linear)), model, data()) == {"last": model.last}
    pair = TensorDictSequential(
        TensorDictModule(nn.Linear(3, 3), ["a"], ["b"]), TensorDictModule(nn.Linear(3, 3), ["b"], ["c"])
    )
    assert list(select(Reads("b"), pair)) == ["module.1.module"]


def test_embeddings_raise_no_warning():
    tokens = nn.Sequential(nn.Embedding(7, 3), nn.Linear(3, 2))
    with LRP("epsilon_plus", input_modules=["0"]).prepare(tokens):
        pass


def test_what_is_never_called_is_no_unit():
    model = TensorDictSequential(
        TensorDictModule(nn.Linear(4, 3, bias=False), ["x"], ["h"]),
        TensorDictModule(nn.Linear(3, 2, bias=False), ["h"], ["y"]),
    ).double()
    td = LRP([("*", EpsilonRule())], target=Target("y", 0)).wrap(model)(
        TensorDict(x=torch.randn(5, 4).double(), batch_size=[5])
    )
    torch.testing.assert_close(td["attr", "x"].sum(-1), td["y"][:, 0], rtol=1e-3, atol=1e-4)


def test_normalisation_is_not_the_layer_that_reads():
    norm, first = nn.BatchNorm1d(3), nn.Linear(3, 4)
    model = TensorDictModule(nn.Sequential(norm, first, nn.PReLU(), nn.Linear(4, 2)), ["x"], ["y"]).eval()
    td = TensorDict(x=torch.randn(5, 3), batch_size=[5])
    for seen in (None, td):
        assert select(Reads("x"), model, seen) == {"module.1": first}
        assert list(select(Writes("y"), model, seen)) == ["module.3"]
    lazy = TensorDictModule(nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2)), ["x"], ["y"])
    assert list(select(Reads("x"), lazy)) == list(select(Reads("x"), lazy, td)) == ["module.0"]


class Scaled(nn.Module):
    def forward(self, x):
        return torch.tanh(x) * 3


def test_a_module_that_is_ignored_is_left_alone():
    model = nn.Sequential(nn.Linear(3, 4, bias=False), Scaled(), nn.Linear(4, 2, bias=False)).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    composite = [(Scaled, IgnoreRule()), (nn.Linear, EpsilonRule(1e-9))]
    lrp = LRP(composite, target=Target("output", 0), flow="gradient")
    assert [row.operation for row in lrp.plan(model, TensorDict(input=x, batch_size=[5]))] == [None] * 3
    relevance = lrp.wrap(model)(TensorDict(input=x, batch_size=[5]))["attr", "input"]
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(leaf)[:, 0].sum(), leaf)
    torch.testing.assert_close(relevance, x * gradient, rtol=1e-6, atol=1e-9)


def test_dropout_in_training_passes_on_what_it_let_through():
    model = nn.Sequential(
        nn.Linear(3, 40, bias=False), nn.Dropout(0.5), nn.Linear(40, 1, bias=False)
    ).double()
    explained = LRP("epsilon_plus", target=Target("output", 0), ledger=True).wrap(model.train())
    td = explained(TensorDict(input=torch.randn(5, 3, dtype=torch.float64), batch_size=[5]))
    torch.testing.assert_close(td["ledger", "inputs"], td["output"][:, 0], rtol=1e-3, atol=1e-5)
