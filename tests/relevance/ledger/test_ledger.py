"""The ledger: what it says, what it costs nobody, and that it notices what is wrong."""

import gc
import io

import pytest
import torch
from rich.console import Console
from tensordict import TensorDict
from torch import Tensor, nn

from tdhook import LRP, Target
from tdhook.rules import EpsilonRule, IgnoreRule, PassRule, StopRule, UniformRule
from tdhook.selectors import Name, Op

NAMES = ("target", "inputs", "absorbed", "gap")


class Block(nn.Module):
    """A residual block with a gate and a normalisation, on ``[B, n]``."""

    def __init__(self, size=6):
        super().__init__()
        self.inner, self.gate, self.norm = nn.Linear(size, size), nn.Linear(size, size), nn.LayerNorm(size)

    def forward(self, x):
        return self.norm(x + self.inner(x).relu() * self.gate(x).sigmoid())


class Centred(nn.Module):
    """Where the elements of a batch meet."""

    def forward(self, x):
        return x - x.mean(0)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block(), nn.Linear(6, 3)).double()


def explain(model, x, composite="epsilon_plus", batch=None, target=0, **arguments):
    td = TensorDict(input=x, batch_size=x.shape[:-1] if batch is None else batch)
    explained = LRP(composite, target=Target("output", target), ledger=True, **arguments).wrap(model)
    return explained(td), explained


@pytest.mark.parametrize("flow", ["relevance", "gradient"])
@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 4), (130,), (2, 1, 3)], ids=str)
def test_everything_is_accounted_for_per_batch_element(model, flow, shape):
    x = torch.randn(*shape, 6, dtype=torch.float64)
    td, _ = explain(model, x, flow=flow)
    book = td["ledger"]
    assert all(book[name].shape == shape for name in NAMES)
    torch.testing.assert_close(book["target"], td["output"][..., 0])
    torch.testing.assert_close(book["inputs"], td["attr", "input"].sum(-1))
    torch.testing.assert_close(book["target"], book["inputs"] + book["absorbed"] + book["gap"])
    assert (book["gap"].abs() < 1e-9 * book["target"].abs()).all()
    assert (book["absorbed"].abs() > 1e-3 * book["target"].abs()).any()


def test_elements_together_are_as_each_alone(model):
    x = torch.randn(9, 6, dtype=torch.float64)
    together, explained = explain(model, x)
    for i in range(9):
        alone, single = explain(model, x[i : i + 1])
        torch.testing.assert_close(together["ledger"][i : i + 1], alone["ledger"], rtol=1e-9, atol=1e-12)
        for a, b in zip(explained.ledger.entries, single.ledger.entries, strict=True):
            for reason in ("arrived", "left", "bias", "stabiliser", "constant"):
                torch.testing.assert_close(a.of(reason).expand(9)[i], b.of(reason)[0], rtol=1e-6, atol=1e-9)


def test_elements_that_meet_are_told_apart_nevertheless(model):
    mixing = nn.Sequential(nn.Linear(6, 6), Centred(), model).double()
    x = torch.randn(5, 6, dtype=torch.float64)
    td, _ = explain(mixing, x, [(nn.Linear, EpsilonRule())])
    assert (td["ledger", "gap"].abs() < 1e-9 * td["ledger", "target"].abs()).all()
    # What is not in the relevance of an element's own input is in that of others.
    assert not torch.allclose(td["ledger", "inputs"], td["attr", "input"].sum(-1))
    torch.testing.assert_close(td["ledger", "inputs"].sum(), td["attr", "input"].sum())


def test_it_changes_nothing_else(model):
    x = torch.randn(4, 6, dtype=torch.float64)
    td, _ = explain(model, x)
    plain = LRP("epsilon_plus", target=Target("output", 0)).wrap(model)(TensorDict(input=x, batch_size=[4]))
    assert torch.equal(td["attr", "input"], plain["attr", "input"]) and "ledger" not in plain
    assert torch.equal(td["output"], plain["output"])


def test_several_targets(model):
    td, _ = explain(model, torch.randn(4, 6, dtype=torch.float64), target="all")
    assert td["ledger", "gap"].shape == (4, 3)
    torch.testing.assert_close(td["ledger", "target"], td["output"])
    torch.testing.assert_close(td["ledger", "inputs"], td["attr", "input"].sum(-1))
    assert (td["ledger", "gap"].abs() < 1e-9).all()


@pytest.mark.parametrize(
    "flow, pairs, culprit",
    [
        ("relevance", [(Op("add"), IgnoreRule())], "add()"),
        ("gradient", [(Op("add"), IgnoreRule())], None),  # a sum needs no rule there
        ("relevance", [(Op("mul"), EpsilonRule(1e-9))], "mul()"),
        ("gradient", [(Op("mul"), EpsilonRule(1e-9))], "mul()"),
        ("gradient", [(Op("mul"), IgnoreRule())], "mul()"),
        ("relevance", [(Op("relu"), UniformRule())], None),
        ("gradient", [(Name("1.gate"), PassRule())], None),
    ],
)
def test_a_wrong_rule_opens_a_gap_where_it_is(model, flow, pairs, culprit):
    x = torch.randn(5, 6, dtype=torch.float64)
    td, explained = explain(model, x, [*pairs, (nn.Linear, EpsilonRule(1e-9))], flow=flow)
    gap = td["ledger", "gap"].abs() / td["ledger", "target"].abs()
    opened = {e.name for e in explained.ledger.entries if (e.gap.abs() > 1e-6).any()}
    assert (gap < 1e-9).all() == (culprit is None)
    assert opened == (set() if culprit is None else {culprit})


def test_what_is_kept_has_its_reason(model):
    x = torch.randn(5, 6, dtype=torch.float64)
    td, explained = explain(
        model, x, [(Name("0.gate"), StopRule()), (nn.Linear, EpsilonRule(0.5))], flow="relevance"
    )
    kept = {e.path: e for e in explained.ledger.summary() if not e.name.endswith("()")}
    assert set(kept["0.gate"].amounts) == {"arrived", "left", "stop"}
    assert (kept["0.gate"].of("left") == 0).all() and (kept["0.gate"].of("stop") != 0).all()
    head = kept["2"]
    z, bias = td["output"][:, 0], model[2].bias[0]
    stabilised = z + 0.5 * z.sign()
    torch.testing.assert_close(head.of("bias"), z * bias / stabilised)
    torch.testing.assert_close(head.of("stabiliser"), z * (stabilised - z) / stabilised)
    assert (td["ledger", "gap"].abs() < 1e-9).all()


def test_a_report(model):
    x = torch.randn(5, 6, dtype=torch.float64)
    _, explained = explain(model, x, [(Op("mul"), EpsilonRule(1e-9)), (nn.Linear, EpsilonRule(1e-9))])
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(explained.report())
    text = console.export_text(styles=True)
    rows = [line for line in text.splitlines() if "mul()" in line]
    assert len(rows) == 2 and all("\x1b[1;31m" in row for row in rows)  # bold and red: a gap
    assert "0.inner" in text and "layer_norm()" in text and "relu()" in text
    assert all(heading in text for heading in ("arrived", "left", "bias", "stabiliser", "stop", "constant"))
    assert not any("\x1b[1;31m" in line for line in text.splitlines() if "add()" in line)


def test_without_a_ledger_there_is_no_report(model):
    explained = LRP("epsilon_plus", target=Target("output", 0)).wrap(model)
    explained(TensorDict(input=torch.randn(2, 6).double(), batch_size=[2]))
    with pytest.raises(RuntimeError, match="give LRP"):
        explained.report()


@pytest.mark.parametrize(
    "arguments",
    [{"composite": "guided_backprop"}, {"rule_mapper": lambda name, module: None}],
    ids=["modified gradient", "mapper"],
)
def test_what_conserves_nothing_has_no_ledger(model, arguments):
    explained = LRP(target=Target("output", 0), ledger=True, warn_on_missing_rule=False, **arguments).wrap(
        model
    )
    with pytest.raises(ValueError, match="ledger=True needs a composite whose result is relevance"):
        explained(TensorDict(input=torch.randn(2, 6).double(), batch_size=[2]))


def test_single_precision(model):
    td, _ = explain(model.float(), torch.randn(8, 6))
    assert td["ledger", "gap"].dtype == torch.float32
    assert (td["ledger", "gap"].abs() < 1e-4 * td["ledger", "target"].abs()).all()


class Overwriting(nn.Module):
    """Overwrites what its backward pass needs, and has second derivatives that refer to what they save."""

    def forward(self, x):
        y = x.exp()
        y += 1
        return y.log().softmax(-1)


def test_accounts_hold_no_tape():
    """Of a model that overwrites values the second run keeps what they were, by hooks on what the tape saves."""

    def on_tapes():
        gc.collect()
        return sum(issubclass(type(x), Tensor) and x.grad_fn is not None for x in gc.get_objects())

    td = TensorDict({"input": torch.randn(2, 3)}, batch_size=[2])
    with LRP("attn_lrp", target=Target("output", 0), flow="gradient", ledger=True).prepare(
        Overwriting()
    ) as explained:
        explained(td.copy())
        before = on_tapes()
        for _ in range(3):
            explained(td.copy())
        assert on_tapes() == before
