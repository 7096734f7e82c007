"""Recurrent layers with all steps at once: what comes back through their cells is a linear recurrence.

Gates are constants, activations pass and sums are shared by epsilon. So in the gradient convention each operation of a
cell (:mod:`tdhook.relevance.rules.cells`) multiplies by a number that the forward pass tells. These numbers are found
for all steps together; what remains to be done step by step are a few products. It is the same with differences from a
reference, where the numbers are slopes of secants and means of factors, and gates may have a share.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from tdhook.relevance.propagation.rule import Rule, RuleOf
from tdhook.relevance.propagation.stabilisers import Stabilizer, rounding
from tdhook.relevance.rules.cell_factors import (
    FACTORS,
    Differences,
    Factors,
    Inside,
    Reading,
    Steps,
    Values,
    times,
)
from tdhook.relevance.rules.cells import State, Weights
from tdhook.relevance.rules.epsilon import EpsilonRule, NormRule, UniformEpsilonRule
from tdhook.relevance.rules.products import SignalTakeAllRule
from tdhook.relevance.rules.simple import PassRule
from tdhook.tape.functions import Context, TapeFunction, alias, on_tape

__all__ = ["Recurrence", "inside_of"]

_MOVING = ("cat", "chunk", "getitem", "stack", "unbind")


def inside_of(kind: str, rule_of: RuleOf, x: Tensor, weight: Tensor) -> Inside | None:
    """From the rules of the operations; ``None`` where one of them is another one than is meant here.

    Args:
        kind: of the cell.
        rule_of: tells them.
        x: what is on the tape.
        weight: a constant.
    """
    if not all(getattr(rule_of(name, [x]), "native", False) for name in _MOVING):
        return None
    activation = "relu" if kind == "rnn_relu" else "tanh"
    if any(type(rule_of(name, x)) is not PassRule for name in (activation, "sigmoid")):
        return None
    product = rule_of("mul", x, x)
    linear, sums = _stabilizer(rule_of("linear", x, weight)), _stabilizer(rule_of("add", x, x))
    if linear is None or sums is None or not _leaves_gates(product):
        return None
    return Inside(linear, sums, type(product) is not SignalTakeAllRule)


def _leaves_gates(rule: Rule | None) -> bool:
    """Whether of a product with a constant the other factor has all relevance."""
    if type(rule) is SignalTakeAllRule:
        return rule.signal is None
    return type(rule) in (EpsilonRule, UniformEpsilonRule) and _stabilizes_nothing(rule)


def _stabilizes_nothing(rule: Any) -> bool:
    return rule.epsilon is rounding and not rule.zero_params


def _stabilizer(rule: Any) -> Stabilizer | None:
    """Of epsilon; what a user's function would see of one step is not what it would see of all."""
    if type(rule) not in (EpsilonRule, NormRule) or rule.zero_params:
        return None
    epsilon: Stabilizer = rule.epsilon
    return None if callable(epsilon) and epsilon is not rounding else epsilon


class _OfRecurrence(Context, Protocol):
    factors: Factors


class Recurrence(TapeFunction):
    """One direction of one layer, all steps at once."""

    @staticmethod
    def run(
        kind: str,
        x: Sequence[Tensor],
        state: Sequence[State],
        weights: Weights,
        inside: Inside,
        outputs: Sequence[Tensor],
    ) -> State:
        """Its outputs, and the cells if it has some, with the way back on the tape.

        Args:
            kind: of the cell.
            x: ``[time, batch, input]``; against a reference, that on the reference as well, here and below.
            state: the first one, each part ``[batch, state]``.
            weights: those of the cell.
            inside: how the operations inside are ruled.
            outputs: ``[time, batch, state]``, which the fused kernel has computed.
        """
        with torch.no_grad():
            before = [
                torch.cat([first[0].unsqueeze(0), made[:-1]])
                for first, made in zip(state, outputs, strict=True)
            ]
            start = tuple(map(_sides, zip(*state, strict=True)))
            first = not on_tape(state[0][-1])
            reading: Reading = Differences(inside.shares, first) if len(x) > 1 else Values()
            factors = FACTORS[kind](Steps(_sides(x), _sides(before), start, weights, inside, reading))
        found: State = Recurrence.apply(factors, outputs[0], x[0], *state[0])
        return found

    @staticmethod
    def forward(factors: Factors, outputs: Tensor, x: Tensor, *state: Tensor) -> State:
        """The values."""
        return tuple(alias(made) for made in (outputs, factors.cells) if made is not None)

    @staticmethod
    def setup_context(ctx: _OfRecurrence, inputs: tuple[Any, ...], output: State) -> None:
        """Keep the factors."""
        ctx.factors = inputs[0]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: _OfRecurrence, outputs: Tensor | None, cells: Tensor | None = None) -> object:
        """From the last step to the first: of the state, and of what is carried along, a cell or the state itself."""
        factors = ctx.factors
        to_state: Tensor | None = None
        carried: Tensor | None = None
        spread: list[Tensor] = []
        for step in reversed(range(len(factors.enters))):
            arrived = _sum(_at(outputs, step), to_state)
            carried = _sum(_at(cells, step), carried)
            if arrived is not None and factors.projection is not None:
                arrived = times(arrived, _at(factors.projected, step)) @ factors.projection
            if arrived is None:  # nothing is read but the last cell
                arrived = torch.zeros_like(factors.enters[step])
            if carried is None:
                g = arrived * factors.enters[step]
            else:
                g = torch.addcmul(times(carried, _at(factors.stays, step)), arrived, factors.enters[step])
            spread.append(factors.spread(g, arrived))
            carried = None if factors.leaves is None else g * factors.leaves[step]
            to_state = times(spread[-1], _at(factors.to_state, step)) @ factors.state
        to_data = times(torch.stack(spread[::-1]), factors.to_input) @ factors.input
        if factors.cells is not None:
            return None, None, to_data, to_state, carried
        return None, None, to_data, _sum(to_state, carried)


def _at(values: Tensor | None, step: int) -> Tensor | None:
    return None if values is None else values[step]


def _sum(x: Tensor | None, y: Tensor | None) -> Tensor | None:
    if x is None or y is None:
        return y if x is None else x
    return x + y


def _sides(values: Sequence[Tensor]) -> Tensor:
    """Values, or beside them those on a reference."""
    return values[0] if len(values) == 1 else torch.stack(list(values))
