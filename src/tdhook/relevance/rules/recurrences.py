"""Recurrent layers with all steps at once: what comes back through their cells is a linear recurrence.

Gates are constants, activations pass and sums are shared by epsilon. So in the gradient convention each operation of a
cell (:mod:`tdhook.relevance.rules.cells`) multiplies by a number that the forward pass tells. These numbers are found
for all steps together; what remains to be done step by step are a few products.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from tdhook.relevance.propagation.rule import Rule, RuleOf
from tdhook.relevance.propagation.stabilisers import (
    Stabilizer,
    plain_quotient,
    quotient,
    rounding,
    stabilize,
)
from tdhook.relevance.rules.cells import State, Weights
from tdhook.relevance.rules.epsilon import EpsilonRule, NormRule, UniformEpsilonRule
from tdhook.relevance.rules.products import SignalTakeAllRule
from tdhook.relevance.rules.simple import PassRule
from tdhook.tape.functions import Context, TapeFunction, alias

__all__ = ["Inside", "Recurrence"]

_MOVING = ("cat", "chunk", "getitem", "stack", "unbind")


class Inside(NamedTuple):
    """The stabilisers of what a cell consists of.

    Attributes:
        linear: that of products with weights.
        sums: that of sums.
    """

    linear: Stabilizer
    sums: Stabilizer

    @staticmethod
    def of(kind: str, rule_of: RuleOf, x: Tensor, weight: Tensor) -> Inside | None:
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
        if type(rule_of(activation, x)) is not PassRule or not _leaves_gates(rule_of("mul", x.detach(), x)):
            return None
        linear, sums = _stabilizer(rule_of("linear", x, weight)), _stabilizer(rule_of("add", x, x))
        return None if linear is None or sums is None else Inside(linear, sums)


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


@dataclass(frozen=True, slots=True)
class _Factors:
    """By what is multiplied on the way back; each is ``[time, batch, hidden]``, or ``None`` where it is one.

    Attributes:
        enters: on the way from the state of a step to what is carried along inside it.
        stays: on the way of what is carried along from the step after.
        leaves: on the way of what is carried along to the step before; ``None`` where nothing is.
        to_state: on the way from what is carried along to what is multiplied with ``state``.
        to_input: likewise with ``input``.
        state: ``W_hh`` of the signal, ``[hidden, state]``.
        input: ``W_ih`` of the signal, ``[hidden, input]``.
        projected: what the state is multiplied by before ``projection``, ``[time, batch, state]``.
        projection: ``[state, hidden]``.
    """

    enters: Tensor
    stays: Tensor | None
    leaves: Tensor | None
    to_state: Tensor | None
    to_input: Tensor | None
    state: Tensor
    input: Tensor
    projected: Tensor | None = None
    projection: Tensor | None = None


def _kept(z: Tensor, epsilon: Stabilizer) -> Tensor | None:
    """What is left where a sum was stabilised."""
    return None if epsilon is rounding else quotient(z, stabilize(z, epsilon))


def _times(x: Tensor, factor: Tensor | None) -> Tensor:
    return x if factor is None else x * factor


def _at(factor: Tensor | None, step: int) -> Tensor | None:
    return None if factor is None else factor[step]


def _of_lstm(x: Tensor, before: Tensor, state: State, weights: Weights, inside: Inside) -> _Factors:
    i, f, g, o = weights.gates(x, before).chunk(4, -1)
    i, f, o, signal = i.sigmoid(), f.sigmoid(), o.sigmoid(), g.tanh()
    cell, cells = state[1], []
    for gained, forgotten in zip((i * signal).unbind(), f.unbind(), strict=True):
        cell = torch.addcmul(gained, forgotten, cell)
        cells.append(cell)
    c = torch.stack(cells)
    bounded = c.tanh()
    stays = _kept(c, inside.sums)
    drawn = _times(i * plain_quotient(signal, g), _kept(g, inside.linear))
    made = None if weights.projection is None else F.linear(o * bounded, weights.projection)
    n, width = g.shape[-1], x.shape[-1]
    rows = weights.joint[2 * n : 3 * n]
    return _Factors(
        enters=_times(o * plain_quotient(bounded, c), stays),
        stays=stays,
        leaves=f,
        to_state=drawn,
        to_input=drawn,
        state=rows[:, width:],
        input=rows[:, :width],
        projected=None if made is None else _kept(made, inside.linear),
        projection=weights.projection,
    )


def _of_gru(x: Tensor, before: Tensor, state: State, weights: Weights, inside: Inside) -> _Factors:
    r, z = weights.gates(x, before).sigmoid().chunk(2, -1)
    w_ih, w_hh, b_ih, b_hh = weights.separate
    of_input, of_state = F.linear(x, w_ih, b_ih), F.linear(before, w_hh, b_hh)
    total = of_input + r * of_state
    signal = total.tanh()
    made = (1 - z) * signal + z * before
    stays = _kept(made, inside.sums)
    drawn = _times((1 - z) * plain_quotient(signal, total), _kept(total, inside.sums))
    return _Factors(
        enters=torch.ones_like(made) if stays is None else stays,
        stays=stays,
        leaves=z,
        to_state=_times(drawn * r, _kept(of_state, inside.linear)),
        to_input=_times(drawn, _kept(of_input, inside.linear)),
        state=w_hh,
        input=w_ih,
    )


def _of_simple(activation: Callable[[Tensor], Tensor]) -> _Make:
    def make(x: Tensor, before: Tensor, state: State, weights: Weights, inside: Inside) -> _Factors:
        total = weights.gates(x, before)
        enters = _times(plain_quotient(activation(total), total), _kept(total, inside.linear))
        width = x.shape[-1]
        return _Factors(enters, None, None, None, None, weights.joint[:, width:], weights.joint[:, :width])

    return make


_Make: TypeAlias = "Callable[[Tensor, Tensor, State, Weights, Inside], _Factors]"
_FACTORS: Mapping[str, _Make] = {
    "lstm": _of_lstm,
    "gru": _of_gru,
    "rnn_tanh": _of_simple(torch.tanh),
    "rnn_relu": _of_simple(torch.relu),
}


class _OfRecurrence(Context, Protocol):
    factors: _Factors


class Recurrence(TapeFunction):
    """One direction of one layer, all steps at once."""

    @staticmethod
    def run(kind: str, x: Tensor, state: State, weights: Weights, inside: Inside, values: State) -> State:
        """Its values, with the way back on the tape.

        Args:
            kind: of the cell.
            x: ``[time, batch, input]``.
            state: the first one, each part ``[batch, state]``.
            weights: those of the cell.
            inside: what stabilises inside.
            values: outputs ``[time, batch, state]`` and the last state, which the fused kernel has computed.
        """
        with torch.no_grad():
            before = torch.cat([state[0].unsqueeze(0), values[0][:-1]])
            factors = _FACTORS[kind](x, before, state, weights, inside)
        found: State = Recurrence.apply(factors, values, x, *state)
        return found

    @staticmethod
    def forward(factors: _Factors, values: State, x: Tensor, *state: Tensor) -> State:
        """The values."""
        return tuple(map(alias, values))

    @staticmethod
    def setup_context(ctx: _OfRecurrence, inputs: tuple[Any, ...], output: State) -> None:
        """Keep the factors."""
        ctx.factors = inputs[0]

    @staticmethod
    def backward(ctx: _OfRecurrence, *grads: Tensor) -> object:
        """From the last step to the first: of the state, and of what is carried along, a cell or the state itself."""
        factors = ctx.factors
        outputs, to_state, *cell = grads
        carried = cell[0] if cell else None
        inside: list[Tensor] = []
        for step in reversed(range(len(factors.enters))):
            g = outputs[step] + to_state
            if factors.projection is not None:
                g = _times(g, _at(factors.projected, step)) @ factors.projection
            if carried is None:
                g = g * factors.enters[step]
            else:
                g = torch.addcmul(_times(carried, _at(factors.stays, step)), g, factors.enters[step])
            inside.append(g)
            if factors.leaves is not None:
                carried = g * factors.leaves[step]
            to_state = _times(g, _at(factors.to_state, step)) @ factors.state
        to_data = _times(torch.stack(inside[::-1]), factors.to_input) @ factors.input
        if cell:
            return None, None, to_data, to_state, carried
        return None, None, to_data, to_state if carried is None else to_state + carried
