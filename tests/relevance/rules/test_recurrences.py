"""All steps of a recurrent network at once come to what they come to one by one, written out in operations.

The ledger wants to know of operations, so that with one they are written out; that is compared with NumPy in
``tests/relevance/operations/test_recurrent.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from tdhook import LRP, Target
from tdhook.composites import lstm_lrp
from tdhook.relevance.rules.recurrences import Recurrence
from tdhook.rules import EpsilonRule, PassRule, RecurrentRule, UniformEpsilonRule
from tdhook.selectors import First, Name, Op

BATCH, TIME, FEATURES, HIDDEN = 3, 4, 3, 5
KINDS: dict[str, Callable[..., nn.Module]] = {
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "rnn_tanh": nn.RNN,
    "rnn_relu": lambda *args, **kwargs: nn.RNN(*args, nonlinearity="relu", **kwargs),
}
SHAPES = {
    "plain": {},
    "time first": {"batch_first": False},
    "both directions of two layers": {"num_layers": 2, "bidirectional": True},
    "without bias": {"bias": False},
    "dropping": {"num_layers": 2, "dropout": 0.5},
}


class Policy(nn.Module):
    """Weighs all outputs of a recurrent network, and its last states."""

    def __init__(self, network: nn.Module, packed: bool = False) -> None:
        super().__init__()
        self.encoder, self.network, self.packed = nn.Linear(2, FEATURES), network, packed
        self.head = nn.LazyLinear(2)

    def forward(self, x: Tensor, h: Tensor | None = None, c: Tensor | None = None) -> Tensor:
        x = torch.relu(self.encoder(x))
        x = x if self.network.batch_first else x.transpose(0, 1)
        if self.packed:
            x = pack_padded_sequence(x, torch.tensor([2, 4, 3]), batch_first=True, enforce_sorted=False)
        first = [state.transpose(0, 1).contiguous() for state in (h, c) if state is not None]
        outputs, last = self.network(x, tuple(first) if len(first) == 2 else first[0] if first else None)
        if self.packed:
            outputs, _ = pad_packed_sequence(outputs, batch_first=True)
        outputs = outputs if self.network.batch_first else outputs.transpose(0, 1)
        states = last if isinstance(last, tuple) else (last,)
        return self.head(torch.cat([outputs.flatten(1), *(s.transpose(0, 1).flatten(1) for s in states)], 1))


def policy(kind: str, dtype: torch.dtype = torch.float64, packed: bool = False, **options: Any) -> Policy:
    torch.manual_seed(0)
    made = Policy(KINDS[kind](FEATURES, HIDDEN, **{"batch_first": True, **options}), packed).double()
    made(torch.zeros(BATCH, TIME, 2, dtype=torch.float64))
    return made.to(dtype)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kinds of the layers whose steps were done at once."""
    noted: list[str] = []
    run = Recurrence.run

    def noting(kind: str, *args: Any) -> Any:
        noted.append(kind)
        return run(kind, *args)

    monkeypatch.setattr(Recurrence, "run", staticmethod(noting))
    return noted


def explained(
    model: nn.Module, *, ledger: bool, seed: int = 1, **inputs: Tensor
) -> Callable[..., TensorDict]:
    def explain(preset: Any = "lstm_lrp", target: Any = "argmax", **options: Any) -> TensorDict:
        td = TensorDict(inputs, [BATCH]).clone()
        method = LRP(preset, target=Target("output", target), ledger=ledger, **options)
        with method.prepare(model, in_keys=list(inputs)) as run:
            torch.manual_seed(seed)
            return run(td)

    return explain


def assert_same(
    model: nn.Module, inputs: dict[str, Tensor], *args: Any, tolerance: float = 1e-10, **options: Any
):
    found = explained(model, ledger=False, **inputs)(*args, **options)
    written = explained(model, ledger=True, **inputs)(*args, **options)
    assert torch.equal(found["output"], written["output"])
    for key in inputs:
        expected = written["attr", key]
        torch.testing.assert_close(
            found["attr", key], expected, rtol=0, atol=tolerance * float(expected.abs().max())
        )
        assert expected.any()


@pytest.mark.parametrize("flow", ["gradient", "relevance"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_at_once_as_step_by_step(kind: str, shape: str, flow: str, runs: list[str]) -> None:
    options = SHAPES[shape]
    model = policy(kind, **options).train("dropout" in options)
    x = torch.randn(BATCH, TIME, 2, dtype=torch.float64)
    for preset in ("lstm_lrp", "attn_lrp"):
        assert_same(model, {"x": x}, preset, flow=flow)
    layers = options.get("num_layers", 1) * (2 if "bidirectional" in options else 1)
    # In the relevance flow, ReLU passes on what arrives where it is zero.
    assert runs == [] if (kind, flow) == ("rnn_relu", "relevance") else runs == [kind] * 2 * layers


@pytest.mark.parametrize("flow", ["gradient", "relevance"])
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != "dropping"])
@pytest.mark.parametrize("kind", KINDS)
def test_against_a_reference(kind: str, shape: str, flow: str, runs: list[str]) -> None:
    """Gates take their share, or the mean of both runs where the signal takes all."""
    model, x = policy(kind, **SHAPES[shape]), torch.randn(BATCH, TIME, 2, dtype=torch.float64)
    for preset in ("deeplift", "lstm_lrp"):
        assert_same(model, {"x": x}, preset, flow=flow, baseline={"x": 0.3})
    layers = model.network.num_layers * (2 if model.network.bidirectional else 1)
    assert runs == [kind] * 2 * layers


@pytest.mark.parametrize("preset", ["deeplift", "lstm_lrp"])
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_first_states_against_a_reference(kind: str, preset: str, runs: list[str]) -> None:
    """Of a state that is attributed the product with a gate is one of two activations, from the first step on."""
    model, h = policy(kind, num_layers=2), torch.randn(BATCH, 2, HIDDEN, dtype=torch.float64)
    inputs = {"x": torch.randn(BATCH, TIME, 2, dtype=torch.float64), "h": h}
    if kind == "lstm":
        inputs["c"] = torch.randn_like(h)
    assert_same(
        model, inputs, preset, baseline={"x": "mean", "h": 0.5, **({"c": -0.5} if "c" in inputs else {})}
    )
    assert len(runs) == 2


class Started(nn.Module):
    """A policy whose first states are made of the inputs, off the tape."""

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, x: Tensor) -> Tensor:
        network = self.policy.network
        layers = network.num_layers * (2 if network.bidirectional else 1)
        h = x.detach()[:, :1, :1].expand(-1, layers, HIDDEN) + 0.5
        return self.policy(x, h, 2 * h if isinstance(network, nn.LSTM) else None)


@pytest.mark.parametrize("preset", ["deeplift", "lstm_lrp"])
@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn_tanh"])
def test_constant_first_states_that_are_others_there(kind: str, preset: str, runs: list[str]) -> None:
    """What they meet first takes all that they lead to, or the mean; that of a sequence is its own."""
    model = Started(policy(kind, packed=True, bidirectional=True))
    x = torch.randn(BATCH, TIME, 2, dtype=torch.float64)
    assert_same(model, {"x": x}, preset, baseline={"x": 0.3})
    assert len(runs) == 2


def test_other_weights_on_the_reference_are_refused() -> None:
    class Fast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.GRUCell(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            weights = {name: p * x.detach().mean() for name, p in self.cell.named_parameters()}
            return torch.func.functional_call(self.cell, weights, (x,))

    explain = explained(Fast(), ledger=False, x=torch.randn(BATCH, 2))
    with pytest.raises(NotImplementedError, match="gru_cell computes with other weights"):
        explain("deeplift", 0, baseline=0.0)


def test_all_of_the_difference_arrives() -> None:
    model, x = policy("lstm"), torch.randn(BATCH, TIME, 2, dtype=torch.float64)
    found = explained(model, ledger=False, x=x)("deeplift", 1, baseline=0.0)["attr", "x"]
    with torch.no_grad():
        difference = (model(x) - model(0 * x))[:, 1]
    torch.testing.assert_close(found.flatten(1).sum(1), difference, rtol=1e-9, atol=1e-9)


def test_projections_and_first_states(runs: list[str]) -> None:
    x = torch.randn(BATCH, TIME, 2, dtype=torch.float64)
    assert_same(policy("lstm", proj_size=2), {"x": x})
    h = torch.randn(BATCH, 2, HIDDEN, dtype=torch.float64)
    assert_same(policy("gru", num_layers=2), {"x": x, "h": h})
    assert runs == ["lstm", "gru", "gru"]


class Unrolled(nn.Module):
    """Calls a cell step by step."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell, self.head = cell, nn.Linear(TIME * HIDDEN, 2)

    def forward(self, x: Tensor) -> Tensor:
        state, outputs = None, []
        for step in x.unbind(1):
            state = self.cell(step, state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        return self.head(torch.cat(outputs, 1))


@pytest.mark.parametrize("flow", ["gradient", "relevance"])
@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cells(cell: type[nn.Module], flow: str, runs: list[str]) -> None:
    torch.manual_seed(0)
    model, x = Unrolled(cell(2, HIDDEN)).double(), torch.randn(BATCH, TIME, 2, dtype=torch.float64)
    assert_same(model, {"x": x}, flow=flow)
    assert len(runs) == TIME


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_precision(dtype: torch.dtype, tolerance: float, runs: list[str]) -> None:
    x = torch.randn(BATCH, TIME, 2, dtype=dtype)
    assert_same(policy("lstm", dtype), {"x": x}, tolerance=tolerance)
    assert runs


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_each_of_several_outputs(kind: str, runs: list[str]) -> None:
    assert_same(policy(kind), {"x": torch.randn(BATCH, TIME, 2, dtype=torch.float64)}, target="all")
    assert runs


def test_compiled_against_a_reference() -> None:
    model, x = policy("gru"), torch.randn(BATCH, TIME, 2, dtype=torch.float64)
    eager, compiled = (
        LRP("lstm_lrp", target=Target("output", 1), baseline=0.0, compile=compile).wrap(model, in_keys=["x"])
        for compile in (False, True)
    )
    td = TensorDict({"x": x}, [BATCH])
    torch.testing.assert_close(compiled(td.clone())["attr", "x"], eager(td.clone())["attr", "x"])


def _twice(z: Tensor) -> Tensor:
    return 2 * z


@pytest.mark.parametrize(
    "pairs",
    [
        [(Op("add") & Name("network"), UniformEpsilonRule())],
        [(Op("tanh") & Name("network"), EpsilonRule(0.1))],
        [(Op("mul"), EpsilonRule(0.1))],
        [(Op("linear"), EpsilonRule(0.1, zero_params="bias"))],
        [(Op("linear") & Name("network"), EpsilonRule(_twice))],
        [(First(Op("tanh")), EpsilonRule(0.1))],
        [(Op("chunk"), EpsilonRule(0.1))],
    ],
    ids=repr,
)
def test_rules_that_do_more_than_multiply_have_it_written_out(pairs: Any, runs: list[str]) -> None:
    assert_same(
        policy("lstm"), {"x": torch.randn(BATCH, TIME, 2, dtype=torch.float64)}, [*pairs, *lstm_lrp()]
    )
    assert not runs


def test_rules_by_path_are_asked_for_the_network(runs: list[str]) -> None:
    x = torch.randn(BATCH, TIME, 2, dtype=torch.float64)
    for pairs in (
        [(Op("linear") & Name("network"), EpsilonRule(0.1)), (Op("tanh"), PassRule())],
        [(Op("add") & Name("network"), EpsilonRule(0.3))],
    ):
        assert_same(policy("gru"), {"x": x}, [*pairs, *lstm_lrp()])
    assert runs == ["gru", "gru"]


def test_half_precision_is_written_out(runs: list[str]) -> None:
    """What numbers multiply to would overflow."""
    x = torch.randn(BATCH, TIME, 2, dtype=torch.float16)
    assert_same(policy("gru", torch.float16), {"x": x}, tolerance=0.1)
    assert not runs


@pytest.mark.parametrize("baseline", [None, 0.3])
@pytest.mark.parametrize("shape", ["plain", "both directions of two layers", "dropping"])
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_packed_sequences(kind: str, shape: str, baseline: float | None, runs: list[str]) -> None:
    options = SHAPES[shape]
    model = policy(kind, packed=True, **options).train("dropout" in options and baseline is None)
    x = torch.randn(BATCH, TIME, 2, dtype=torch.float64)
    assert_same(model, {"x": x}, "lstm_lrp" if baseline is None else "deeplift", baseline=baseline)
    assert set(runs) == {kind}


@pytest.mark.parametrize("proj_size", [0, 2])
def test_what_only_the_last_cell_tells(proj_size: int, runs: list[str]) -> None:
    class Cell(nn.Module):
        def __init__(self, network: nn.Module) -> None:
            super().__init__()
            self.network = network

        def forward(self, x: Tensor) -> Tensor:
            return self.network(x)[1][1].sum(0)

    torch.manual_seed(0)
    model = Cell(nn.LSTM(2, HIDDEN, batch_first=True, proj_size=proj_size).double())
    assert_same(model, {"x": torch.randn(BATCH, TIME, 2, dtype=torch.float64)})
    assert runs


def test_a_rule_for_what_is_dropped_is_heeded(runs: list[str]) -> None:
    model = policy("lstm", num_layers=2, dropout=0.5).train()
    x = torch.randn(BATCH, TIME, 2, dtype=torch.float64)
    assert_same(model, {"x": x}, [(Op("dropout"), EpsilonRule(0.1)), *lstm_lrp()])
    assert not runs


def test_a_rule_of_ones_own_is_run_as_it_says(runs: list[str]) -> None:
    class Own(RecurrentRule):
        def running(self, module: nn.Module, flow: str) -> Any:
            run = super().running(module, flow)
            return lambda call: run(call)

    x = torch.randn(BATCH, TIME, 2, dtype=torch.float64)
    assert_same(policy("lstm"), {"x": x}, [(Op("lstm"), Own()), *lstm_lrp()])
    assert not runs
