"""Functions that normalise: softmax and its kin, and layers that divide by a deviation, each in closed form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from tdhook.relevance.secants.averages import average
from tdhook.relevance.secants.pair import Grads, Pair

__all__ = ["log_softmax", "logsumexp", "softmax", "softmax_axis", "softmax_axis_of", "softmin"]


def softmax(pair: Pair, grads: Sequence[Tensor]) -> Grads:
    """``s_i - s0_i = L_i (dx_i - sum_k L_k dx_k / sum_k L_k)``, where ``L`` is the logarithmic mean of both.

    That is the derivative of softmax with the logarithmic mean in place of the value, and it is exact.
    """
    if len(pair.live) != 1:
        return average(pair, grads)
    means, total = _means(pair)
    (g,) = grads
    centre = (means * g).sum(_axis(pair), keepdim=True) / total
    return (means * (g - centre),)


def softmin(pair: Pair, grads: Sequence[Tensor]) -> Grads:
    """The softmax of what is turned round."""
    if len(pair.live) != 1:
        return average(pair, grads)
    ends, starts = (tuple(-x for x in values) for values in (pair.ends, pair.starts))
    return tuple(None if g is None else -g for g in softmax(replace(pair, ends=ends, starts=starts), grads))


def log_softmax(pair: Pair, grads: Sequence[Tensor]) -> Grads:
    """``x_i`` less the logarithm of the sum of exponentials."""
    if len(pair.live) != 1:
        return average(pair, grads)
    means, total = _means(pair)
    (g,) = grads
    return (g - means * (g.sum(_axis(pair), keepdim=True) / total),)


def logsumexp(pair: Pair, grads: Sequence[Tensor]) -> Grads:
    """``sum_k L_k dx_k / sum_k L_k``."""
    dim = pair.argument(1, "dim")
    if len(pair.live) != 1 or not isinstance(dim, int):
        return average(pair, grads)
    means, total = _means(pair)
    g = grads[0] if pair.argument(2, "keepdim", False) else grads[0].unsqueeze(dim)
    return (means * (g / total),)


def _axis(pair: Pair) -> int:
    module, n_axes = pair.module, pair.ends[0].dim()
    if module is None:
        return softmax_axis(pair.argument(1, "dim"), n_axes)
    return softmax_axis_of(module, n_axes)


def _means(pair: Pair) -> tuple[Tensor, Tensor]:
    """The logarithmic means of two softmaxes, and their sum along the axis."""
    (x,), (start,), axis = pair.ends, pair.starts, _axis(pair)
    now, before = x.log_softmax(axis), start.log_softmax(axis)
    more, less = torch.maximum(now, before), torch.minimum(now, before)
    # Nothing where both are masked; the smallest number is as good as zero, and can be divided by.
    gap = (more - less).nan_to_num_(0.0, torch.inf).clamp_min_(torch.finfo(x.dtype).tiny)
    part = torch.expm1(-gap).div_(gap).neg_()  # (1 - exp(-d)) / d
    means = more.exp_().mul_(part).nan_to_num_(0.0)
    total = means.sum(axis, keepdim=True)
    return means, torch.where(total == 0, 1.0, total)


def softmax_axis(dim: object, n_axes: int) -> int:
    """The axis that a softmax goes along: the one that is given, or the one that torch takes without."""
    if isinstance(dim, int):
        return dim
    return 0 if n_axes in (0, 1, 3) else 1


def softmax_axis_of(module: nn.Module, n_axes: int) -> int:
    """The axis that a module goes along: the last one, unless it is a softmax of torch."""
    if isinstance(module, nn.Softmax2d):
        return -3
    if isinstance(module, nn.Softmax | nn.LogSoftmax | nn.Softmin):
        return softmax_axis(module.dim, n_axes)
    return -1
