"""Definitions: the formulas that rules compute in a cheaper way, written down plainly, contribution by contribution.

Each takes one layer ``z_j = sum_i w_ji x_i + b_j`` and the relevance of its outputs, and gives that of its inputs.
Nothing here is used to explain; the tests compare the rules with it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tdhook.relevance.propagation.stabilisers import stabilize

__all__ = ["alpha_beta", "epsilon", "gamma"]


def _contributions(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``c_ji = w_ji x_i``, and last in each row the bias, an input of one: ``[*batch, out, in + 1]``."""
    inputs = weight * x.unsqueeze(-2)
    return torch.cat([inputs, bias.expand(inputs.shape[:-1]).unsqueeze(-1)], -1)


def _shares(contributions: Tensor, relevance: Tensor, stabilizer: float) -> Tensor:
    """``sum_j c_ji R_j / stab(sum_i c_ji)`` of the inputs; the bias keeps its own: ``[*batch, in]``."""
    per_output = relevance / stabilize(contributions.sum(-1), stabilizer)
    return (contributions * per_output.unsqueeze(-1)).sum(-2)[..., :-1]


def epsilon(x: Tensor, weight: Tensor, bias: Tensor, relevance: Tensor, stabilizer: float) -> Tensor:
    """Bach et al. 2015, eq. 58.

    Args:
        x: the input, ``[*batch, in]``.
        weight: ``[out, in]``.
        bias: ``[out]``.
        relevance: that of the outputs, ``[*batch, out]``.
        stabilizer: the ``eps`` of ``stab``.
    """
    return _shares(_contributions(x, weight, bias), relevance, stabilizer)


def alpha_beta(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    relevance: Tensor,
    stabilizer: float,
    *,
    alpha: float,
    beta: float,
) -> Tensor:
    """Bach et al. 2015, eq. 60, with the arguments of :func:`epsilon` and the weights of either sign."""
    c = _contributions(x, weight, bias)
    gained = _shares(c.clamp(min=0), relevance, stabilizer)
    # The sum of what is negative is stabilised downwards, also where there is nothing to sum.
    lost = _shares(-c.clamp(max=0), relevance, stabilizer)
    return alpha * gained - beta * lost


def gamma(
    x: Tensor, weight: Tensor, bias: Tensor, relevance: Tensor, stabilizer: float, *, gamma: float
) -> Tensor:
    """Montavon et al. 2019 and Andeol et al. 2021, with the arguments of :func:`epsilon` and the rule's ``gamma``."""
    c = _contributions(x, weight, bias)
    rises = c.sum(-1, keepdim=True) >= 0
    favoured = torch.where(rises, c.clamp(min=0), c.clamp(max=0))
    c = c + gamma * favoured
    return _shares(c, relevance, stabilizer)
