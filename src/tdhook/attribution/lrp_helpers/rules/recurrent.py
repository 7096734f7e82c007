"""Recurrent networks, written out step by step so that rules reach the operations of their cells."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdhook.attribution.lrp_helpers.conversions import Substituted
from tdhook.attribution.lrp_helpers.rule import Convention, RunningRule

__all__ = ["RecurrentRule"]

State: TypeAlias = tuple[Tensor, ...]
Cell: TypeAlias = Callable[[Tensor, State, Sequence[Tensor]], State]


class RecurrentRule(RunningRule):
    """LSTM, GRU and simple recurrent networks, step by step: gates are held constant (Arras et al. 2017, 2019).

    Of each product of a gate and a signal the signal takes all relevance, and sums and products with weights have the
    rules of these operations (epsilon, unless a composite says otherwise), as have the activations (pass). The values
    are those of the fused kernel.
    """

    convention: ClassVar[Convention] = "gradient"
    opens: ClassVar[bool] = True
    in_both: ClassVar[bool] = True

    def run_in(
        self,
        flow: Convention,
        module: nn.Module,
        original: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Nothing to convert: the operations inside are ruled in the convention of the flow."""
        return self.run(module, original, args, kwargs)

    def run(
        self, module: nn.Module, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Call the fused kernel for its values, and write its computation on the tape."""
        name = type(module).__name__
        if name not in _CELLS:  # a module, whose operations are ruled one by one
            return original(*args, **kwargs)
        with torch.no_grad():
            values = original(*args, **kwargs)
        written = _cell_call(name, *args, **kwargs) if name.endswith("_cell") else _network(name, *args)
        single = isinstance(values, Tensor)
        pairs = zip((written,) if single else written, (values,) if single else values, strict=True)
        outputs = tuple(Substituted.apply(w, v) for w, v in pairs)
        return outputs[0] if single else outputs


def _joint(x: Tensor, h: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """``W_ih x + b_ih + W_hh h + b_hh`` as one product, so that one stabiliser is at work."""
    w_ih, w_hh, *biases = weights
    bias = biases[0] + biases[1] if len(biases) > 1 else None
    return F.linear(torch.cat([x, h], -1), torch.cat([w_ih, w_hh], -1), bias)


def _lstm(x: Tensor, state: State, weights: Sequence[Tensor]) -> State:
    h, c = state
    w_ih, w_hh, *rest = weights
    biases, projection = rest[: len(rest) // 2 * 2], rest[len(rest) // 2 * 2 :]
    i, f, g, o = _joint(x, h, (w_ih, w_hh, *biases)).chunk(4, -1)
    c = f.sigmoid().detach() * c + i.sigmoid().detach() * g.tanh()
    h = o.sigmoid().detach() * c.tanh()
    return (F.linear(h, projection[0]) if projection else h), c


def _gru(x: Tensor, state: State, weights: Sequence[Tensor]) -> State:
    (h,) = state
    w_ih, w_hh, *biases = weights
    b_ih, b_hh = biases or (None, None)
    n = h.shape[-1]
    part = [None if b is None else (b[: 2 * n], b[2 * n :]) for b in (b_ih, b_hh)]
    gates = [] if part[0] is None or part[1] is None else [part[0][0], part[1][0]]
    r, z = _joint(x, h, (w_ih[: 2 * n], w_hh[: 2 * n], *gates)).sigmoid().detach().chunk(2, -1)
    from_input = F.linear(x, w_ih[2 * n :], None if part[0] is None else part[0][1])
    from_state = F.linear(h, w_hh[2 * n :], None if part[1] is None else part[1][1])
    signal = (from_input + r * from_state).tanh()
    return ((1 - z) * signal + z * h,)


def _simple(activation: Callable[[Tensor], Tensor]) -> Cell:
    return lambda x, state, weights: (activation(_joint(x, state[0], weights)),)


_CELLS: dict[str, Cell] = {
    "lstm": _lstm,
    "gru": _gru,
    "rnn_tanh": _simple(torch.tanh),
    "rnn_relu": _simple(torch.relu),
}
_CELLS |= {f"{name}_cell": cell for name, cell in _CELLS.items()}


def _cell_call(
    name: str,
    input: Tensor,
    hx: Tensor | Sequence[Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Any:
    weights = [w for w in (w_ih, w_hh, b_ih, b_hh) if w is not None]
    state = _CELLS[name](input, (hx,) if isinstance(hx, Tensor) else tuple(hx), weights)
    return state if len(state) > 1 else state[0]


def _network(name: str, data: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """A network over a padded batch ``(hx, params, ...)``, or over a packed one ``(batch_sizes, hx, params, ...)``."""
    packed = isinstance(arguments[1], Tensor) or (
        isinstance(arguments[0], Tensor) and not arguments[0].is_floating_point()
    )
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
        made = []
        for direction in range(directions):
            at = layer * directions + direction
            weights = params[at * per_cell : (at + 1) * per_cell]
            initial = tuple(s[at] for s in states)
            outputs, final = _along(steps, initial, weights, _CELLS[name], reverse=direction == 1)
            made.append(outputs)
            finals.append(final)
        steps = (
            [torch.cat(outputs, -1) for outputs in zip(*made, strict=True)] if directions == 2 else made[0]
        )
    output = torch.cat(steps) if packed else torch.stack(steps, 1 if batch_first else 0)
    return output, *(torch.stack(parts) for parts in zip(*finals, strict=True))


def _along(
    steps: Sequence[Tensor], initial: State, weights: Sequence[Tensor], cell: Cell, *, reverse: bool
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
