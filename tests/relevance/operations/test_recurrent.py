"""Recurrent networks are explained as Arras et al. (2017, 2019) say, whichever way they are called."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from tdhook import LRP, Target
from tdhook.rules import EpsilonRule, SignalTakeAllRule
from tdhook.selectors import Op

from .checks import assert_balanced, assert_same, every_flow
from .recurrent import Direction, Network, weights_of

BATCH, TIME, FEATURES, HIDDEN = 3, 4, 3, 4
EXACT = [(nn.Linear, EpsilonRule(0.0))]
GATED = [*EXACT, (Op("mul"), SignalTakeAllRule())]

KINDS = {
    "lstm": (nn.LSTM, {}),
    "gru": (nn.GRU, {}),
    "tanh": (nn.RNN, {"nonlinearity": "tanh"}),
    "relu": (nn.RNN, {"nonlinearity": "relu"}),
}
SHAPES = {
    "plain": {},
    "two layers": {"num_layers": 2},
    "both directions": {"bidirectional": True},
    "two layers, both directions": {"num_layers": 2, "bidirectional": True},
    "without bias": {"bias": False},
    "time first": {"batch_first": False},
}
LENGTHS = {"in order": [4, 3, 1], "out of order": [2, 4, 3]}


def drawn(module: nn.Module, seed: int = 0) -> nn.Module:
    """A network whose weights are not near zero."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = torch.rand(parameter.shape, generator=generator, dtype=torch.float64) * 1.6 - 0.8
    return module.double().eval()


class Reads(nn.Module):
    """A recurrent network whose outputs and last states are weighed."""

    def __init__(self, network: nn.Module, states: bool, lengths: list[int] | None = None) -> None:
        super().__init__()
        self.network, self.states, self.lengths = network, states, lengths
        self.head = nn.Linear(
            self.made(torch.zeros(BATCH, TIME, FEATURES, dtype=torch.float64)).shape[1], 2, bias=False
        )
        self.double()

    def made(self, x: Tensor, *given: Tensor) -> Tensor:
        hx = None
        if given:
            hx = tuple(s.transpose(0, 1).contiguous() for s in given)
            hx = hx if len(given) == 2 else hx[0]
        if self.lengths is not None:
            x = pack_padded_sequence(x, torch.tensor(self.lengths), batch_first=True, enforce_sorted=False)
        elif not self.network.batch_first:
            x = x.transpose(0, 1)
        outputs, state = self.network(x, hx)
        if self.lengths is not None:
            outputs, _ = pad_packed_sequence(outputs, batch_first=True, total_length=TIME)
        elif not self.network.batch_first:
            outputs = outputs.transpose(0, 1)
        parts = [outputs]
        if self.states:
            parts += [s.transpose(0, 1) for s in (state if isinstance(state, tuple) else (state,))]
        return torch.cat([part.flatten(1) for part in parts], 1)

    def forward(self, x: Tensor, *given: Tensor) -> Tensor:
        return self.head(self.made(x, *given))


def explain(model: nn.Module, flow: str, **inputs: Tensor):
    td = TensorDict(inputs, batch_size=[BATCH])
    lrp = LRP(EXACT, target=Target("output", 0), flow=flow, ledger=True, on_unmatched="raise")
    with lrp.prepare(model, in_keys=list(inputs)) as module:
        module(td)
    td["attr", "input"] = td["attr", next(iter(inputs))]
    assert_balanced(td, module)
    with torch.no_grad():
        torch.testing.assert_close(td["output"], model(*inputs.values()), rtol=1e-12, atol=1e-12)
    return td


def reference(model: Reads, kind: str, x: Tensor, h0=None, c0=None):
    """Relevance of inputs and first states, one sequence after the other."""
    network = model.network
    rows = network.num_layers * (2 if network.bidirectional else 1)
    width = getattr(network, "proj_size", 0) or network.hidden_size
    weight = model.head.weight[0].detach().numpy()
    found = np.zeros(x.shape), np.zeros((BATCH, rows, width)), np.zeros((BATCH, rows, network.hidden_size))
    for b in range(BATCH):
        length = TIME if model.lengths is None else model.lengths[b]
        run = Network(network, kind)
        first = (np.zeros((rows, width)) if h0 is None else h0[b].numpy(),)
        first += (np.zeros((rows, network.hidden_size)) if c0 is None else c0[b].numpy(),)
        outputs, h, c = run.forward(x[b, :length].numpy(), *first)
        n = TIME * len(outputs[0])
        r_outputs = [outputs[t] * weight[t * len(outputs[0]) :][: len(outputs[0])] for t in range(length)]
        r_h, r_c = np.zeros_like(h), np.zeros_like(c)
        if model.states:
            r_h = h * weight[n : n + h.size].reshape(h.shape)
            if kind == "lstm":
                r_c = c * weight[n + h.size :].reshape(c.shape)
        r_x, found[1][b], found[2][b] = run.backward(r_outputs, r_h, r_c)
        found[0][b, :length] = r_x
    return found


def assert_close(td: TensorDict, key: str, expected) -> None:
    """Up to 1e-9 of what was put in: operations have a stabiliser of 1e-12."""
    scale = max(np.abs(expected).max(), td["output"].abs().max().item())
    assert np.abs(td["attr", key].numpy() - expected).max() <= 1e-9 * scale


@every_flow
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_networks(kind: str, shape: str, flow: str) -> None:
    cls, kwargs = KINDS[kind]
    network = drawn(cls(FEATURES, HIDDEN, **{"batch_first": True, **kwargs, **SHAPES[shape]}))
    torch.manual_seed(0)
    model, x = Reads(network, states=True), torch.randn(BATCH, TIME, FEATURES, dtype=torch.float64)
    assert_close(explain(model, flow, x=x), "x", reference(model, kind, x)[0])


@every_flow
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one way", "both ways"])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_sequences(kind: str, bidirectional: bool, lengths: str, flow: str) -> None:
    cls, kwargs = KINDS[kind]
    network = drawn(
        cls(FEATURES, HIDDEN, num_layers=2, bidirectional=bidirectional, batch_first=True, **kwargs)
    )
    torch.manual_seed(0)
    model = Reads(network, states=True, lengths=LENGTHS[lengths])
    x = torch.randn(BATCH, TIME, FEATURES, dtype=torch.float64)
    assert_close(explain(model, flow, x=x), "x", reference(model, kind, x)[0])


@every_flow
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one way", "both ways"])
def test_projections(layers: int, bidirectional: bool, flow: str) -> None:
    network = nn.LSTM(FEATURES, HIDDEN, layers, bidirectional=bidirectional, proj_size=2, batch_first=True)
    network = drawn(network, seed=1)
    torch.manual_seed(0)
    model, x = Reads(network, states=True), torch.randn(BATCH, TIME, FEATURES, dtype=torch.float64)
    assert_close(explain(model, flow, x=x), "x", reference(model, "lstm", x)[0])


@every_flow
@pytest.mark.parametrize("kind", KINDS)
def test_first_states_are_inputs_too(kind: str, flow: str) -> None:
    cls, kwargs = KINDS[kind]
    network = drawn(cls(FEATURES, HIDDEN, num_layers=2, batch_first=True, **kwargs))
    torch.manual_seed(0)
    model = Reads(network, states=False)
    states = [torch.randn(BATCH, 2, HIDDEN, dtype=torch.float64) for _ in range(2 if kind == "lstm" else 1)]
    inputs = {"x": torch.randn(BATCH, TIME, FEATURES, dtype=torch.float64)}
    inputs |= dict(zip(("h", "c"), states, strict=False))
    td = explain(model, flow, **inputs)
    expected = reference(model, kind, inputs["x"], *states)
    for key, array in zip(("x", "h", "c"), expected, strict=True):
        if key in inputs:
            assert_close(td, key, array)


class Unrolled(nn.Module):
    """A cell that is called once for each step."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell, self.head = cell, nn.Linear(TIME * HIDDEN, 2, bias=False, dtype=torch.float64)

    def made(self, x: Tensor) -> Tensor:
        state, outputs = None, []
        for step in x.unbind(1):
            state = self.cell(step, state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        return torch.cat(outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.made(x))


CELLS = {
    "lstm": lambda: nn.LSTMCell(FEATURES, HIDDEN),
    "gru": lambda: nn.GRUCell(FEATURES, HIDDEN),
    "tanh": lambda: nn.RNNCell(FEATURES, HIDDEN),
    "relu": lambda: nn.RNNCell(FEATURES, HIDDEN, nonlinearity="relu"),
}


@every_flow
@pytest.mark.parametrize("kind", CELLS)
def test_cells(kind: str, flow: str) -> None:
    cell = drawn(CELLS[kind]())
    torch.manual_seed(0)
    model, x = Unrolled(cell), torch.randn(BATCH, TIME, FEATURES, dtype=torch.float64)
    expected, weight = np.zeros(x.shape), model.head.weight[0].detach().numpy().reshape(TIME, HIDDEN)
    for b in range(BATCH):
        run = Direction(kind, weights_of(cell))
        outputs, h, c = run.forward(x[b].numpy(), np.zeros(HIDDEN), np.zeros(HIDDEN))
        r_outputs = [z * w for z, w in zip(outputs, weight, strict=True)]
        expected[b] = run.backward(r_outputs, np.zeros_like(h), np.zeros_like(c))[0]
    assert_close(explain(model, flow, x=x), "x", expected)


@every_flow
def test_a_cell_written_by_hand_is_explained_like_that_of_torch(flow: str) -> None:
    class ByHand(nn.Module):
        def __init__(self, cell: nn.LSTMCell) -> None:
            super().__init__()
            self.joint = nn.Linear(FEATURES + HIDDEN, 4 * HIDDEN, dtype=torch.float64)
            self.joint.weight.data = torch.cat([cell.weight_ih, cell.weight_hh], 1).detach()
            self.joint.bias.data = (cell.bias_ih + cell.bias_hh).detach()

        def forward(self, x: Tensor, state) -> tuple[Tensor, Tensor]:
            h, c = state if state is not None else (x.new_zeros(len(x), HIDDEN),) * 2
            i, f, g, o = self.joint(torch.cat([x, h], 1)).chunk(4, 1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            return torch.sigmoid(o) * torch.tanh(c), c

    cell = drawn(nn.LSTMCell(FEATURES, HIDDEN))
    x = torch.randn(BATCH, TIME, FEATURES, dtype=torch.float64)
    found = []
    for used in (cell, ByHand(cell)):
        torch.manual_seed(0)
        lrp = LRP(GATED, target=Target("output", 0), flow=flow, ledger=True, on_unmatched="raise")
        with lrp.prepare(Unrolled(used)) as module:
            td = module(TensorDict(input=x, batch_size=[BATCH]))
        assert_balanced(td, module)
        found.append(td["attr", "input"])
    assert_same(*found, 1e-9)
