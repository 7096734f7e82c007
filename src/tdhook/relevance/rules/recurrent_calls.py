"""What torch's functions for recurrent networks are called with, and what they compute: in operations, or at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tdhook.relevance.rules.cell_factors import Inside
from tdhook.relevance.rules.cells import CELLS, Cell, State, Weights
from tdhook.relevance.rules.recurrences import Recurrence
from tdhook.relevance.rules.sequences import Packed, Padded, Sequences

__all__ = ["CalledCell", "CalledNetwork", "called", "kind_of"]

S = TypeVar("S")
_STEP = "_cell"
_ONE = ("input", "hx", "w_ih", "w_hh", "b_ih", "b_hh")
_PADDED = (
    "input", "hx", "params", "has_biases", "num_layers", "dropout", "train", "bidirectional", "batch_first",
)  # fmt: skip
_PACKED = ("data", "batch_sizes", *_PADDED[1:-1])


def kind_of(function: str) -> str | None:
    """The kind of the cells of a function, a key of :data:`~tdhook.relevance.rules.cells.CELLS`."""
    kind = function.removesuffix(_STEP)
    return kind if kind in CELLS else None


def called(
    name: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> CalledCell | CalledNetwork:
    """What a function of torch is called with, a cell or a network."""
    return (CalledCell if name.endswith(_STEP) else CalledNetwork).of(name, function, args, kwargs)


@dataclass
class CalledCell:
    """One step.

    Attributes:
        kind: of the cell.
        data: ``[batch, features]``.
        states: those before, each ``[batch, state]``.
        params: the parameters.
    """

    kind: str
    data: Tensor
    states: State
    params: Sequence[Tensor]

    dropped = 0.0

    @staticmethod
    def of(
        name: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> CalledCell:
        """From the arguments."""
        given = {**dict(zip(_ONE, args, strict=False)), **kwargs}
        hx = given["hx"]
        states = (hx,) if isinstance(hx, Tensor) else tuple(hx)
        params = [given[key] for key in _ONE[2:] if given.get(key) is not None]
        return CalledCell(name.removesuffix(_STEP), given["input"], states, params)

    def written(self, shares: bool) -> State:
        """The states afterwards, in operations; ``shares``: whether gates take their share."""
        return CELLS[self.kind](self.data, self.states, Weights.of(self.kind, self.params, shares))

    def at_once(self, inside: Inside, values: State, beside: tuple[CalledCell, State] | None = None) -> State:
        """The same, as one operation.

        Args:
            inside: how the operations are ruled.
            values: the states afterwards.
            beside: what it is called with on a reference, and the states there.
        """
        sides = [(self, values)] if beside is None else [(self, values), beside]
        made = Recurrence.run(
            self.kind,
            [side.data.unsqueeze(0) for side, _ in sides],
            [side.states for side, _ in sides],
            Weights.of(self.kind, self.params),
            inside,
            [states[0].unsqueeze(0) for _, states in sides],
        )
        return tuple(part[0] for part in made)


@dataclass
class CalledNetwork:
    """All steps of all layers.

    Attributes:
        kind: of its cells.
        function: the fused kernel.
        data: the sequences, and ``sequences``: how they lie there.
        states: the first ones, each ``[layers * directions, batch, state]``.
        params: of all layers, and ``has_biases``: whether these have some.
        layers: how many there are, and ``directions``: in each of them.
        dropped: which part of the values is dropped between layers.
    """

    kind: str
    function: Callable[..., Any]
    data: Tensor
    sequences: Sequences
    states: State
    params: Sequence[Tensor]
    has_biases: bool
    layers: int
    directions: int
    dropped: float

    @staticmethod
    def of(
        name: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> CalledNetwork:
        """From the arguments."""
        first = args[1] if len(args) > 1 else kwargs.get("batch_sizes")
        packed = isinstance(first, Tensor) and not first.is_floating_point()
        given = {**dict(zip(_PACKED if packed else _PADDED, args, strict=False)), **kwargs}
        hx = given["hx"]
        return CalledNetwork(
            name,
            function,
            given["data" if packed else "input"],
            Packed(given["batch_sizes"].tolist()) if packed else Padded(given["batch_first"]),
            (hx,) if isinstance(hx, Tensor) else tuple(hx),
            given["params"],
            given["has_biases"],
            given["num_layers"],
            2 if given["bidirectional"] else 1,
            float(given["dropout"]) if given["train"] else 0.0,
        )

    def written(self, shares: bool) -> State:
        """Outputs and last states, step by step in operations."""

        def along(steps: list[Tensor], at: int, reverse: bool) -> tuple[list[Tensor], State]:
            weights = Weights.of(self.kind, self._params(at), shares)
            return _along(steps, self._first(at), weights, CELLS[self.kind], reverse=reverse)

        def drop(steps: list[Tensor]) -> list[Tensor]:
            return list(F.dropout(torch.cat(steps), self.dropped).split([x.shape[0] for x in steps]))

        def join(made: Sequence[list[Tensor]]) -> list[Tensor]:
            return [torch.cat(outputs, -1) for outputs in zip(*made, strict=True)]

        steps, last = self._through(self.sequences.steps(self.data), along, drop, join)
        return self.sequences.joined(steps), *last

    def at_once(
        self, inside: Inside, values: State, beside: tuple[CalledNetwork, State] | None = None
    ) -> State:
        """The same, all steps together.

        Args:
            inside: how the operations inside are ruled.
            values: outputs and last states.
            beside: what it is called with on a reference, and outputs and last states there.
        """
        sides = [(self, values)] if beside is None else [(self, values), beside]
        alone, sequences = self.layers * self.directions == 1, self.sequences

        def along(xs: list[Tensor], at: int, reverse: bool) -> tuple[list[Tensor], State]:
            xs = list(map(sequences.backwards, xs)) if reverse else xs
            firsts, made = [side._first(at) for side, _ in sides], []
            for (side, known), x, first in zip(sides, xs, firsts, strict=True):
                made.append(sequences.spread(known[0]) if alone else side._outputs(x, first, at))
            weights = Weights.of(self.kind, self._params(at))
            states = Recurrence.run(self.kind, xs, firsts, weights, inside, made)
            found = [states[0], *made[1:]]
            last = tuple(map(sequences.last, states))
            return list(map(sequences.backwards, found)) if reverse else found, last

        def drop(xs: list[Tensor]) -> list[Tensor]:
            return [sequences.spread(F.dropout(sequences.gathered(x), self.dropped)) for x in xs]

        def join(made: Sequence[list[Tensor]]) -> list[Tensor]:
            return [torch.cat(outputs, -1) for outputs in zip(*made, strict=True)]

        data = [sequences.spread(side.data) for side, _ in sides]
        outputs, last = self._through(data, along, drop, join)
        return sequences.gathered(outputs[0]), *last

    def _params(self, at: int) -> Sequence[Tensor]:
        """Those of one direction of one layer."""
        count = len(self.params) // (self.layers * self.directions)
        return self.params[at * count : (at + 1) * count]

    def _first(self, at: int) -> State:
        return tuple(part[at] for part in self.states)

    def _outputs(self, x: Tensor, first: State, at: int) -> Tensor:
        """Those of one direction of one layer, time first."""
        states = tuple(part.unsqueeze(0) for part in first)
        hx = states if len(states) > 1 else states[0]
        with torch.no_grad():
            outputs: Tensor = self.function(
                x, hx, self._params(at), self.has_biases, 1, 0.0, False, False, False
            )[0]
        return outputs

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
        if size > running:  # these begin here, by themselves: their first states may be constants
            begun = cell(x[running:], tuple(s[running:size] for s in initial), weights)
            state = cell(x[:running], state, weights)
            state = tuple(map(torch.cat, zip(state, begun, strict=True)))
        else:
            state = cell(x, state, weights)
        outputs.append(state[0])
    ended.append(state)
    final = tuple(torch.cat(parts[::-1]) for parts in zip(*ended, strict=True))
    return (outputs[::-1] if reverse else outputs), final
