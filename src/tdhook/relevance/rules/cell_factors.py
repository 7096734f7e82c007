"""By what the operations of recurrent cells multiply on the way back, for all steps of a layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from tdhook.conventions import per_value
from tdhook.relevance.propagation.stabilisers import (
    Stabilizer,
    left_of,
    plain_quotient,
    rounding,
)
from tdhook.relevance.rules.cells import State, Weights
from tdhook.relevance.secants.pair import difference
from tdhook.relevance.secants.slopes import slope

__all__ = ["FACTORS", "Differences", "Factors", "Inside", "Reading", "Steps", "Values", "times"]


class Inside(NamedTuple):
    """How the operations of a cell are ruled.

    Attributes:
        linear: the stabiliser of products with weights.
        sums: that of sums.
        shares: whether gates take their share of a difference.
    """

    linear: Stabilizer
    sums: Stabilizer
    shares: bool


@dataclass(frozen=True, slots=True)
class Factors:
    """By what is multiplied on the way back; each is ``[time, batch, ...]``, or ``None`` where it is one.

    What arrives at the state of a step leads to what is carried along inside it, and from there to the step before. The
    parts of what is multiplied with weights come of what is carried along, and the last one maybe of what arrives.

    Attributes:
        enters: from the state of a step to what is carried along, ``[..., hidden]``.
        stays: of what is carried along from the step after, ``[..., hidden]``.
        leaves: of what is carried along to the step before, ``[..., hidden]``; ``None`` where nothing is.
        to_state: to what is multiplied with ``state``, ``[..., parts * hidden]``.
        to_input: likewise with ``input``.
        state: of the weights, ``[parts * hidden, state]``.
        input: of the weights, ``[parts * hidden, input]``.
        parts: how many there are of what is carried along.
        directly: whether there is one more of what arrives.
        projected: what the state is multiplied by before ``projection``, ``[..., state]``.
        projection: ``[state, hidden]``.
        cells: the values of what an LSTM carries along, ``[..., hidden]``.
    """

    enters: Tensor
    stays: Tensor | None
    leaves: Tensor | None
    to_state: Tensor | None
    to_input: Tensor | None
    state: Tensor
    input: Tensor
    parts: int = 1
    directly: bool = False
    projected: Tensor | None = None
    projection: Tensor | None = None
    cells: Tensor | None = None

    def spread(self, carried: Tensor, arrived: Tensor) -> Tensor:
        """The parts beside each other."""
        if self.parts == 1 and not self.directly:
            return carried
        return torch.cat([*[carried] * self.parts, *([arrived] if self.directly else [])], -1)


class Reading(Protocol):
    """What the operations of a cell multiply by."""

    @property
    def shares(self) -> bool:
        """Whether gates take their share."""

    @property
    def first(self) -> bool:
        """Whether the first state is constant, of which only what it meets can take a share."""

    def values(self, x: Tensor) -> Tensor:
        """The values as they are."""

    def gate(self, x: Tensor) -> Tensor:
        """A factor of a product, to the other one."""

    def constant(self, x: Tensor, factor: Tensor) -> Tensor:
        """A constant one, to the other one."""

    def slope(self, function: Callable[[Tensor], Tensor], x: Tensor, z: Tensor) -> Tensor:
        """A function that is applied to each value."""

    def kept(self, z: Tensor, epsilon: Stabilizer) -> Tensor | None:
        """A stabilised sum."""


class Values:
    """Values as they are: gates are constants. All is ``[time, batch, hidden]``."""

    shares = first = False

    def values(self, x: Tensor) -> Tensor:
        return x

    def gate(self, x: Tensor) -> Tensor:
        return x

    def constant(self, x: Tensor, factor: Tensor) -> Tensor:
        return x

    def slope(self, function: Callable[[Tensor], Tensor], x: Tensor, z: Tensor) -> Tensor:
        return plain_quotient(z, x)

    def kept(self, z: Tensor, epsilon: Stabilizer) -> Tensor | None:
        return None if epsilon is rounding else left_of(z, epsilon)


@dataclass(frozen=True, slots=True)
class Differences:
    """Differences from what values are on a reference. All is ``[2, time, batch, hidden]``: values, and those there."""

    shares: bool
    first: bool

    def values(self, x: Tensor) -> Tensor:
        return x[0]

    def gate(self, x: Tensor) -> Tensor:
        return torch.lerp(x[1], x[0], 0.5)

    def constant(self, x: Tensor, factor: Tensor) -> Tensor:
        if not self.shares:
            return self.gate(x)
        # One that is another there is so because of what is attributed, which takes all.
        rise = difference(x[0] * factor[0], x[1] * factor[1])
        return torch.where(x[0] == x[1], x[0], per_value(difference(factor[0], factor[1]), rise))

    def slope(self, function: Callable[[Tensor], Tensor], x: Tensor, z: Tensor) -> Tensor:
        return slope(function.__name__, function, x[0], x[1], z[0], z[1])

    def kept(self, z: Tensor, epsilon: Stabilizer) -> Tensor | None:
        if epsilon is rounding or epsilon == 0:
            return None
        return left_of(difference(z[0], z[1]), epsilon)


def times(x: Tensor, factor: Tensor | None) -> Tensor:
    """The product, where there is a factor."""
    return x if factor is None else x * factor


@dataclass(frozen=True, slots=True)
class Steps:
    """All steps of one direction of one layer.

    Attributes:
        x: what came in, ``before``: the states before each step, ``start``: the first state, and ``weights``.
        inside: what stabilises inside.
        reading: what operations multiply by.
    """

    x: Tensor
    before: Tensor
    start: State
    weights: Weights
    inside: Inside
    reading: Reading

    def activated(self, function: Callable[[Tensor], Tensor], x: Tensor, z: Tensor, *by: Tensor) -> Tensor:
        """On the way from a product with ``by`` to a sum of products with weights, through an activation."""
        made = self.reading.slope(function, x, z)
        for factor in by:
            made = made * factor
        return times(made, self.reading.kept(x, self.inside.linear))

    def met(self, x: Tensor, gate: Tensor) -> Tensor:
        """What a gate meets of the states before, as far as it takes a share of the product."""
        met = self.reading.gate(x)
        if not self.reading.first:
            return met
        first = self.reading.constant(x[:, :1], gate[:, :1])
        return torch.cat([first, met[1:] if self.reading.shares else torch.zeros_like(met[1:])])

    @property
    def gated(self) -> bool:
        """Whether anything comes back through gates."""
        return self.reading.shares or self.reading.first


def _of_lstm(steps: Steps) -> Factors:
    weights, inside, reading = steps.weights, steps.inside, steps.reading
    to_i, to_f, to_g, to_o = weights.gates(steps.x, steps.before).chunk(4, -1)
    i, f, o, signal = to_i.sigmoid(), to_f.sigmoid(), to_o.sigmoid(), to_g.tanh()
    cell, cells = steps.start[1], [steps.start[1]]
    for gained, forgotten in zip((i * signal).unbind(-3), f.unbind(-3), strict=True):
        cell = torch.addcmul(gained, forgotten, cell)
        cells.append(cell)
    c, c_before = torch.stack(cells[1:], -3), torch.stack(cells[:-1], -3)
    bounded = c.tanh()
    stays = reading.kept(c, inside.sums)
    drawn = [steps.activated(torch.tanh, to_g, signal, reading.gate(i))]
    rows = weights.joint.chunk(4)[2]
    if steps.gated:
        none = torch.zeros_like(drawn[0])
        of_i = steps.activated(torch.sigmoid, to_i, i, reading.gate(signal)) if reading.shares else none
        of_f = steps.activated(torch.sigmoid, to_f, f, steps.met(c_before, f))
        of_o = steps.activated(torch.sigmoid, to_o, o, reading.gate(bounded)) if reading.shares else none
        drawn, rows = [of_i, of_f, *drawn, of_o], weights.joint
    factor, width = torch.cat(drawn, -1), steps.x.shape[-1]
    projected = None
    if weights.projection is not None:
        projected = reading.kept(F.linear(o * bounded, weights.projection), inside.linear)
    return Factors(
        enters=times(reading.gate(o) * reading.slope(torch.tanh, c, bounded), stays),
        stays=stays,
        leaves=reading.gate(f),
        to_state=factor,
        to_input=factor,
        state=rows[:, width:],
        input=rows[:, :width],
        parts=3 if steps.gated else 1,
        directly=steps.gated,
        projected=projected,
        projection=weights.projection,
        cells=reading.values(c),
    )


def _of_gru(steps: Steps) -> Factors:
    weights, inside, reading = steps.weights, steps.inside, steps.reading
    to_r, to_z = weights.gates(steps.x, steps.before).chunk(2, -1)
    r, z = to_r.sigmoid(), to_z.sigmoid()
    w_ih, w_hh, b_ih, b_hh = weights.separate
    of_input, of_state = F.linear(steps.x, w_ih, b_ih), F.linear(steps.before, w_hh, b_hh)
    total = of_input + r * of_state
    signal = total.tanh()
    made = (1 - z) * signal + z * steps.before
    stays = reading.kept(made, inside.sums)
    drawn = reading.gate(1 - z) * reading.slope(torch.tanh, total, signal)
    drawn = times(drawn, reading.kept(total, inside.sums))
    to_state = [times(drawn * reading.gate(r), reading.kept(of_state, inside.linear))]
    to_input = [times(drawn, reading.kept(of_input, inside.linear))]
    state, input = w_hh, w_ih
    if steps.gated:
        met = steps.met(steps.before, z)
        if reading.shares:
            met = met - reading.gate(signal)
        gates = [
            steps.activated(torch.sigmoid, to_r, r, drawn, steps.met(of_state, r)),
            steps.activated(torch.sigmoid, to_z, z, met),
        ]
        to_state, to_input = gates + to_state, gates + to_input
        width = steps.x.shape[-1]
        state = torch.cat([weights.joint[:, width:], state])
        input = torch.cat([weights.joint[:, :width], input])
    return Factors(
        enters=torch.ones_like(drawn) if stays is None else stays,
        stays=stays,
        leaves=reading.gate(z),
        to_state=torch.cat(to_state, -1),
        to_input=torch.cat(to_input, -1),
        state=state,
        input=input,
        parts=len(to_state),
    )


def _of_simple(activation: Callable[[Tensor], Tensor]) -> _Make:
    def make(steps: Steps) -> Factors:
        total = steps.weights.gates(steps.x, steps.before)
        enters = steps.activated(activation, total, activation(total))
        joint, width = steps.weights.joint, steps.x.shape[-1]
        return Factors(enters, None, None, None, None, joint[:, width:], joint[:, :width])

    return make


_Make: TypeAlias = "Callable[[Steps], Factors]"
FACTORS: Mapping[str, _Make] = {
    "lstm": _of_lstm,
    "gru": _of_gru,
    "rnn_tanh": _of_simple(torch.tanh),
    "rnn_relu": _of_simple(torch.relu),
}
