"""Recurrent networks: all steps at once, or step by step, so that rules reach the operations of their cells."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdhook.conventions import Convention
from tdhook.relevance.propagation.again import Again
from tdhook.relevance.propagation.call import Call, Run
from tdhook.relevance.propagation.conversions import Substituted
from tdhook.relevance.propagation.rule import RuleOf, RunningRule, converted
from tdhook.relevance.rules.cells import CELLS, Cell, State, Weights
from tdhook.relevance.rules.recurrences import Inside, Recurrence
from tdhook.relevance.rules.simple import PassRule
from tdhook.tape.functions import on_tape

__all__ = ["RecurrentRule"]

S = TypeVar("S")


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

    def at_once(self, call: Call, flow: Convention, rule_of: RuleOf) -> Run | None:
        """All steps of a padded batch together, where the operations inside have rules that multiply by numbers.

        In the relevance flow a ReLU passes on to an activation of zero what no number makes of it.
        """
        kind = type(call.module).__name__
        if (
            type(self) is not RecurrentRule
            or kind not in CELLS
            or (kind == "rnn_relu" and flow == "relevance")
        ):
            return None
        network = _Network.of(call)
        if network.sizes is not None or network.data.dtype not in _WITH_ROOM:
            return None
        live = [x for x in (network.data, *network.states) if on_tape(x)]
        if not live or any(map(on_tape, network.params)):
            return None
        inside = Inside.of(kind, rule_of, live[0], network.params[0])
        passes = not network.dropped or type(rule_of("dropout", live[0], network.dropped, True)) is PassRule
        if inside is None or not passes:
            return None

        def run(call: Call) -> Any:
            network = _Network.of(call)
            return _valued(call, network.dropped > 0, lambda values: network.at_once(inside, values))

        return converted(run, "gradient", flow)

    @staticmethod
    def _written(module: nn.Module, *, shares: bool) -> Run:
        name = type(module).__name__
        kind = name.removesuffix("_cell")
        if kind not in CELLS:  # a module, whose operations are ruled one by one
            return Call.execute

        def run_cell(call: Call) -> Any:
            return _valued(call, False, lambda _: _cell_call(kind, shares, *call.args, **call.kwargs))

        def run(call: Call) -> Any:
            network = _Network.of(call)
            return _valued(call, network.dropped > 0, lambda _: network.written(shares))

        return run if kind == name else run_cell


_WITH_ROOM = frozenset((torch.float32, torch.float64, torch.bfloat16))


def _valued(call: Call, drops: bool, write: Callable[[State], Any]) -> Any:
    """The values of a call, on the tape of what ``write`` makes of them; ``drops``: having drawn the same numbers."""
    again = Again() if drops else None
    with torch.no_grad():
        values = call.execute()
    single = isinstance(values, Tensor)
    with nullcontext() if again is None else again.as_before():
        written = write((values,) if single else values)
    pairs = zip((written,) if single else written, (values,) if single else values, strict=True)
    outputs = tuple(Substituted.apply(w, v) for w, v in pairs)
    return outputs[0] if single else outputs


def _cell_call(
    kind: str,
    shares: bool,
    input: Tensor,
    hx: Tensor | Sequence[Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Any:
    params = [w for w in (w_ih, w_hh, b_ih, b_hh) if w is not None]
    state = CELLS[kind](
        input, (hx,) if isinstance(hx, Tensor) else tuple(hx), Weights.of(kind, params, shares)
    )
    return state if len(state) > 1 else state[0]


_PADDED = (
    "input", "hx", "params", "has_biases", "num_layers", "dropout", "train", "bidirectional", "batch_first",
)  # fmt: skip
_PACKED = ("data", "batch_sizes", *_PADDED[1:-1])


@dataclass
class _Network:
    """What a network is called with.

    Attributes:
        kind: of its cells.
        function: the fused kernel.
        data: a padded batch, ``[batch, time, features]`` or time first; or a packed one, ``[steps, features]``.
        sizes: how many sequences of a packed batch have each of the steps.
        states: the first ones, each ``[layers * directions, batch, state]``.
        params: of all layers, and ``has_biases``: whether these have some.
        layers: how many there are, and ``directions``: in each of them.
        dropped: which part of the values is dropped between layers.
        batch_first: whether a padded batch is.
    """

    kind: str
    function: Callable[..., Any]
    data: Tensor
    sizes: list[int] | None
    states: State
    params: Sequence[Tensor]
    has_biases: bool
    layers: int
    directions: int
    dropped: float
    batch_first: bool

    @staticmethod
    def of(call: Call) -> _Network:
        """From the arguments of torch's functions."""
        args, kwargs = call.args, call.kwargs
        first = args[1] if len(args) > 1 else kwargs.get("batch_sizes")
        packed = isinstance(first, Tensor) and not first.is_floating_point()
        given = {**dict(zip(_PACKED if packed else _PADDED, args, strict=False)), **kwargs}
        hx = given["hx"]
        return _Network(
            type(call.module).__name__,
            call.function,
            given["data" if packed else "input"],
            given["batch_sizes"].tolist() if packed else None,
            (hx,) if isinstance(hx, Tensor) else tuple(hx),
            given["params"],
            given["has_biases"],
            given["num_layers"],
            2 if given["bidirectional"] else 1,
            float(given["dropout"]) if given["train"] else 0.0,
            not packed and given["batch_first"],
        )

    def written(self, shares: bool) -> State:
        """Outputs and last states, step by step in operations."""
        axis = 1 if self.batch_first else 0
        steps = list(self.data.unbind(axis) if self.sizes is None else self.data.split(self.sizes))

        def along(steps: list[Tensor], at: int, reverse: bool) -> tuple[list[Tensor], State]:
            weights = Weights.of(self.kind, self._params(at), shares)
            return _along(steps, self._first(at), weights, CELLS[self.kind], reverse=reverse)

        def drop(steps: list[Tensor]) -> list[Tensor]:
            return list(F.dropout(torch.cat(steps), self.dropped).split([x.shape[0] for x in steps]))

        def join(made: Sequence[list[Tensor]]) -> list[Tensor]:
            return [torch.cat(outputs, -1) for outputs in zip(*made, strict=True)]

        steps, last = self._through(steps, along, drop, join)
        return torch.stack(steps, axis) if self.sizes is None else torch.cat(steps), *last

    def at_once(self, inside: Inside, values: State) -> State:
        """The same of a padded batch, all steps together.

        Args:
            inside: what stabilises inside.
            values: outputs and last states.
        """
        alone = self.layers * self.directions == 1

        def along(x: Tensor, at: int, reverse: bool) -> tuple[Tensor, State]:
            x, first = x.flip(0) if reverse else x, self._first(at)
            if alone:
                made = (self._swapped(values[0]), *(part[0] for part in values[1:]))
            else:
                made = self._values(x, first, self._params(at))
            weights = Weights.of(self.kind, self._params(at))
            outputs, *last = Recurrence.run(self.kind, x, first, weights, inside, made)
            return outputs.flip(0) if reverse else outputs, tuple(last)

        def drop(x: Tensor) -> Tensor:
            return F.dropout(x, self.dropped)

        def join(made: Sequence[Tensor]) -> Tensor:
            return torch.cat(list(made), -1)

        outputs, last = self._through(self._swapped(self.data), along, drop, join)
        return self._swapped(outputs), *last

    def _swapped(self, x: Tensor) -> Tensor:
        """Time first, or from there back."""
        return x.transpose(0, 1) if self.batch_first else x

    def _params(self, at: int) -> Sequence[Tensor]:
        """Those of one direction of one layer."""
        count = len(self.params) // (self.layers * self.directions)
        return self.params[at * count : (at + 1) * count]

    def _first(self, at: int) -> State:
        return tuple(part[at] for part in self.states)

    def _values(self, x: Tensor, first: State, params: Sequence[Tensor]) -> State:
        """Those of one direction of one layer, time first."""
        states = tuple(part.unsqueeze(0) for part in first)
        hx = states if len(states) > 1 else states[0]
        with torch.no_grad():
            outputs, *last = self.function(x, hx, params, self.has_biases, 1, 0.0, False, False, False)
        return outputs, *(part[0] for part in last)

    def _through(
        self,
        sequence: S,
        along: Callable[[S, int, bool], tuple[S, State]],
        drop: Callable[[S], S],
        join: Callable[[Sequence[S]], S],
    ) -> tuple[S, list[Tensor]]:
        """Outputs and last states after all layers.

        Args:
            sequence: what comes in.
            along: one direction of one layer.
            drop: between layers.
            join: the outputs of two directions.
        """
        finals: list[State] = []
        for layer in range(self.layers):
            if layer and self.dropped:
                sequence = drop(sequence)
            made = []
            for direction in range(self.directions):
                outputs, final = along(sequence, layer * self.directions + direction, direction == 1)
                made.append(outputs)
                finals.append(final)
            sequence = join(made) if len(made) > 1 else made[0]
        return sequence, [torch.stack(parts) for parts in zip(*finals, strict=True)]


def _along(
    steps: Sequence[Tensor], initial: State, weights: Weights, cell: Cell, *, reverse: bool
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
