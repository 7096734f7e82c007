"""Cells of recurrent networks: their weights, and one step of each, written out in operations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["CELLS", "Cell", "State", "Weights"]

State: TypeAlias = tuple[Tensor, ...]
Cell: TypeAlias = "Callable[[Tensor, State, Weights], State]"


@dataclass
class Weights:
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
    def of(kind: str, params: Sequence[Tensor], shares: bool = False) -> Weights:
        """From torch's order.

        Args:
            kind: of the cell, a key of :data:`CELLS`.
            params: the parameters of one layer in one direction.
            shares: whether gates take their share.
        """
        w_ih, w_hh, *rest = params
        biases, projection = rest[: len(rest) // 2 * 2], rest[len(rest) // 2 * 2 :]
        b_ih, b_hh = biases or (None, None)
        # Of a GRU's three parts the last one, the signal, is gated inside; else all are one product.
        n = w_ih.shape[0] * (2 if kind == "gru" else 3) // 3
        bias = None if b_ih is None or b_hh is None else b_ih[:n] + b_hh[:n]
        separate = (
            w_ih[n:],
            w_hh[n:],
            None if b_ih is None else b_ih[n:],
            None if b_hh is None else b_hh[n:],
        )
        joint = torch.cat([w_ih[:n], w_hh[:n]], -1)
        return Weights(joint, bias, separate, projection[0] if projection else None, shares)

    def gate(self, values: Tensor) -> Tensor:
        """Values of gates, as far as they take a share."""
        return values if self.shares else values.detach()

    def gates(self, x: Tensor, h: Tensor) -> Tensor:
        """``W_ih x + b_ih + W_hh h + b_hh`` of the joint gates as one product."""
        return F.linear(torch.cat([x, h], -1), self.joint, self.bias)


def _lstm(x: Tensor, state: State, weights: Weights) -> State:
    h, c = state
    i, f, g, o = weights.gates(x, h).chunk(4, -1)
    c = weights.gate(f.sigmoid()) * c + weights.gate(i.sigmoid()) * g.tanh()
    h = weights.gate(o.sigmoid()) * c.tanh()
    return (h if weights.projection is None else F.linear(h, weights.projection)), c


def _gru(x: Tensor, state: State, weights: Weights) -> State:
    (h,) = state
    r, z = weights.gate(weights.gates(x, h).sigmoid()).chunk(2, -1)
    w_ih, w_hh, b_ih, b_hh = weights.separate
    signal = (F.linear(x, w_ih, b_ih) + r * F.linear(h, w_hh, b_hh)).tanh()
    return ((1 - z) * signal + z * h,)


def _simple(activation: Callable[[Tensor], Tensor]) -> Cell:
    return lambda x, state, weights: (activation(weights.gates(x, state[0])),)


CELLS: Mapping[str, Cell] = {
    "lstm": _lstm,
    "gru": _gru,
    "rnn_tanh": _simple(torch.tanh),
    "rnn_relu": _simple(torch.relu),
}
"""One step, ``(x, state, weights) -> state``, by kind."""
