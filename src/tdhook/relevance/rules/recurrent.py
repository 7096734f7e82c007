"""Recurrent networks, written out step by step so that rules reach the operations of their cells."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdhook.conventions import Convention
from tdhook.relevance.propagation.again import Again
from tdhook.relevance.propagation.call import Call, Run
from tdhook.relevance.propagation.conversions import Substituted
from tdhook.relevance.propagation.rule import RunningRule

__all__ = ["RecurrentRule"]

State: TypeAlias = tuple[Tensor, ...]
Cell: TypeAlias = "Callable[[Tensor, State, _Weights], State]"


class RecurrentRule(RunningRule):
    """LSTM, GRU and simple recurrent networks, step by step: gates are held constant (Arras et al. 2017, 2019).

    Of each product of a gate and a signal the signal takes all relevance, and sums and products with weights have the
    rules of these operations (epsilon, unless a composite says otherwise), as have the activations (pass). The values
    are those of the fused kernel.
    """

    convention: ClassVar[Convention] = "gradient"
    opens: ClassVar[bool] = True
    opens_against: ClassVar[bool] = True
    in_both: ClassVar[bool] = True

    def running(self, module: nn.Module, flow: Convention) -> Run:
        """By the fused kernel for the values, with its computation written on the tape.

        Nothing is converted: the operations inside are ruled in the convention of the flow.
        """
        return self._written(module, shares=False)

    def against(self, module: nn.Module, flow: Convention) -> Run:
        """Likewise, where gates take their share of the difference."""
        return self._written(module, shares=True)

    @staticmethod
    def _written(module: nn.Module, *, shares: bool) -> Run:
        name = type(module).__name__
        if name not in _CELLS:  # a module, whose operations are ruled one by one
            return Call.execute

        def run(call: Call) -> Any:
            args, kwargs = call.args, call.kwargs
            write = _cell_call if name.endswith("_cell") else _network
            again = Again() if write is _network and _dropped(args) else None
            with torch.no_grad():
                values = call.execute()
            with nullcontext() if again is None else again.as_before():
                written = write(name, shares, *args, **kwargs)
            single = isinstance(values, Tensor)
            pairs = zip((written,) if single else written, (values,) if single else values, strict=True)
            outputs = tuple(Substituted.apply(w, v) for w, v in pairs)
            return outputs[0] if single else outputs

        return run


@dataclass
class _Weights:
    """The parameters of one cell, those of its input and of its state side by side, so that one stabiliser is at work.

    Attributes:
        joint: ``[W_ih, W_hh]`` of shape ``[gates, input + hidden]``, and ``bias``: ``b_ih + b_hh``.
        separate: ``W_ih``, ``W_hh``, ``b_ih``, ``b_hh`` of the last of the gates, the signal of a GRU.
        projection: what makes the state smaller, if anything.
        shares: whether gates take their share, or are held constant.
    """

    joint: Tensor
    bias: Tensor | None
    separate: tuple[Tensor, Tensor, Tensor | None, Tensor | None]
    projection: Tensor | None
    shares: bool

    @staticmethod
    def of(params: Sequence[Tensor], n_joint: int, shares: bool) -> _Weights:
        """From torch's order; ``n_joint`` of three parts of the gates are joint, where not all are."""
        w_ih, w_hh, *rest = params
        biases, projection = rest[: len(rest) // 2 * 2], rest[len(rest) // 2 * 2 :]
        b_ih, b_hh = biases or (None, None)
        n = w_ih.shape[0] * n_joint // 3
        bias = None if b_ih is None or b_hh is None else b_ih[:n] + b_hh[:n]
        separate = (
            w_ih[n:],
            w_hh[n:],
            None if b_ih is None else b_ih[n:],
            None if b_hh is None else b_hh[n:],
        )
        joint = torch.cat([w_ih[:n], w_hh[:n]], -1)
        return _Weights(joint, bias, separate, projection[0] if projection else None, shares)

    def gate(self, values: Tensor) -> Tensor:
        """Values of gates, as far as they take a share."""
        return values if self.shares else values.detach()

    def gates(self, x: Tensor, h: Tensor) -> Tensor:
        """``W_ih x + b_ih + W_hh h + b_hh`` of the joint gates as one product."""
        return F.linear(torch.cat([x, h], -1), self.joint, self.bias)


def _lstm(x: Tensor, state: State, weights: _Weights) -> State:
    h, c = state
    i, f, g, o = weights.gates(x, h).chunk(4, -1)
    c = weights.gate(f.sigmoid()) * c + weights.gate(i.sigmoid()) * g.tanh()
    h = weights.gate(o.sigmoid()) * c.tanh()
    return (h if weights.projection is None else F.linear(h, weights.projection)), c


def _gru(x: Tensor, state: State, weights: _Weights) -> State:
    (h,) = state
    r, z = weights.gate(weights.gates(x, h).sigmoid()).chunk(2, -1)
    w_ih, w_hh, b_ih, b_hh = weights.separate
    signal = (F.linear(x, w_ih, b_ih) + r * F.linear(h, w_hh, b_hh)).tanh()
    return ((1 - z) * signal + z * h,)


def _simple(activation: Callable[[Tensor], Tensor]) -> Cell:
    return lambda x, state, weights: (activation(weights.gates(x, state[0])),)


_CELLS: dict[str, Cell] = {
    "lstm": _lstm,
    "gru": _gru,
    "rnn_tanh": _simple(torch.tanh),
    "rnn_relu": _simple(torch.relu),
}


def _n_joint(name: str) -> int:
    """How many thirds of the gates are one product: of a GRU's three the last one, the signal, is gated inside."""
    return 2 if name.startswith("gru") else 3


_CELLS |= {f"{name}_cell": cell for name, cell in _CELLS.items()}


def _cell_call(
    name: str,
    shares: bool,
    input: Tensor,
    hx: Tensor | Sequence[Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Any:
    params = [w for w in (w_ih, w_hh, b_ih, b_hh) if w is not None]
    weights = _Weights.of(params, _n_joint(name), shares)
    state = _CELLS[name](input, (hx,) if isinstance(hx, Tensor) else tuple(hx), weights)
    return state if len(state) > 1 else state[0]


def _network(name: str, shares: bool, data: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """A network over a padded batch ``(hx, params, ...)``, or over a packed one ``(batch_sizes, hx, params, ...)``."""
    dropped = _dropped((data, *arguments))
    packed = _is_packed(arguments)
    if packed:
        sizes, hx, params, _, n_layers, _, _, bidirectional = arguments
        steps = list(data.split(sizes.tolist()))
        batch_first = False
    else:
        hx, params, _, n_layers, _, _, bidirectional, batch_first = arguments
        steps = list(data.unbind(1 if batch_first else 0))
    states: State = (hx,) if isinstance(hx, Tensor) else tuple(hx)
    directions = 2 if bidirectional else 1
    per_cell = len(params) // (n_layers * directions)
    finals: list[State] = []
    for layer in range(n_layers):
        if layer and dropped:
            sizes_of = [x.shape[0] for x in steps]
            steps = list(F.dropout(torch.cat(steps), dropped).split(sizes_of))
        made = []
        for direction in range(directions):
            at = layer * directions + direction
            weights = _Weights.of(params[at * per_cell : (at + 1) * per_cell], _n_joint(name), shares)
            initial = tuple(s[at] for s in states)
            outputs, final = _along(steps, initial, weights, _CELLS[name], reverse=direction == 1)
            made.append(outputs)
            finals.append(final)
        steps = (
            [torch.cat(outputs, -1) for outputs in zip(*made, strict=True)] if directions == 2 else made[0]
        )
    output = torch.cat(steps) if packed else torch.stack(steps, 1 if batch_first else 0)
    return output, *(torch.stack(parts) for parts in zip(*finals, strict=True))


def _is_packed(arguments: Sequence[Any]) -> bool:
    first, second = arguments[:2]
    return isinstance(second, Tensor) or (isinstance(first, Tensor) and not first.is_floating_point())


def _dropped(args: Sequence[Any]) -> float:
    """Which part of the values is dropped between layers."""
    part, training = args[6:8] if _is_packed(args[1:]) else args[5:7]
    return float(part) if training else 0.0


def _along(
    steps: Sequence[Tensor], initial: State, weights: _Weights, cell: Cell, *, reverse: bool
) -> tuple[list[Tensor], State]:
    """One direction of one layer. In a packed batch, steps grow shorter as sequences end."""
    ordered = list(steps)[::-1] if reverse else list(steps)
    state = tuple(s[: ordered[0].shape[0]] for s in initial)
    outputs, ended = [], []
    for x in ordered:
        size, running = x.shape[0], state[0].shape[0]
        if size < running:
            ended.append(tuple(s[size:] for s in state))
            state = tuple(s[:size] for s in state)
        elif size > running:
            state = tuple(torch.cat([s, s0[running:size]]) for s, s0 in zip(state, initial, strict=True))
        state = cell(x, state, weights)
        outputs.append(state[0])
    ended.append(state)
    final = tuple(torch.cat(parts[::-1]) for parts in zip(*ended, strict=True))
    return (outputs[::-1] if reverse else outputs), final
