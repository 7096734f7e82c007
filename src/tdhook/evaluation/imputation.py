"""Imputation: what a picture may have been where pixels are missing."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["imputed"]

_CLOSE = 1e-10
_AT_ONCE = 100_000
"""How many pixels are solved for together: what fits a cache, and what is done is not waited for."""


def imputed(pictures: Tensor, removed: Tensor) -> Tensor:
    """Pictures in which each removed pixel is the weighted mean of its eight neighbours, removed ones among them.

    Neighbours that share a side weigh twice as much as those that share a corner (Rong et al. 2022, section 4.2, with
    weights 1/6 and 1/12; at the edge of a picture, those that are there). The linear system is solved by conjugate
    gradients, until each equation is met to a ten-billionth of the range. Where nothing is left, all is the mean of
    what was there.

    Args:
        pictures: ``[n, height, width]``.
        removed: truth values ``[n, height, width]``.

    Returns:
        ``[n, height, width]``, in double precision.
    """
    at_once = max(1, _AT_ONCE // max(1, pictures.shape[1:].numel()))
    parts = zip(pictures.split(at_once), removed.split(at_once), strict=True)
    return torch.cat([_imputed(*part) for part in parts])


def _imputed(pictures: Tensor, removed: Tensor) -> Tensor:
    x = pictures.to(torch.float64)
    known = ~removed
    any_left = known.flatten(1).any(1)[:, None, None]
    left = torch.where(any_left, known, True)
    mean = (x * left).sum((1, 2), keepdim=True) / left.sum((1, 2), keepdim=True)
    # Solved for what lies above or below the mean of what is left.
    shifted = torch.where(known, x - mean, 0.0)
    unknown = (removed & any_left).to(torch.float64)
    weight = _around(torch.ones_like(x))
    target = _around(shifted) * unknown
    found = _solved(target, unknown, weight, _CLOSE * shifted.abs().amax((1, 2), keepdim=True))
    return torch.where(known, x, found + mean)


def _solved(target: Tensor, unknown: Tensor, weight: Tensor, close: Tensor) -> Tensor:
    """``v`` that is zero but for unknown pixels, with ``weight v - around(v) = target`` there."""
    solution = torch.zeros_like(target)
    residual, scaled = target, target / weight
    direction, size = scaled, (target * scaled).sum((1, 2), keepdim=True)
    for _ in range(target.shape[1:].numel()):
        # Those that are close enough stay as they are, whatever else is in the batch.
        going = residual.abs().amax((1, 2), keepdim=True) > close
        if not bool(going.any()):
            break
        product = (weight * direction - _around(direction)) * unknown
        length = (direction * product).sum((1, 2), keepdim=True)
        step = torch.where(going & (length > 0), size / length, 0.0)
        solution = solution + step * direction
        residual = residual - step * product
        scaled = residual / weight
        before, size = size, (residual * scaled).sum((1, 2), keepdim=True)
        direction = scaled + torch.where(before > 0, size / before, 0.0) * direction
    return solution


def _around(x: Tensor) -> Tensor:
    """The weighted sum of the eight neighbours: ``(1, 2, 1) x (1, 2, 1)``, without the middle, over twelve."""
    down = 2 * x
    down[:, 1:] += x[:, :-1]
    down[:, :-1] += x[:, 1:]
    both = 2 * down
    both[:, :, 1:] += down[:, :, :-1]
    both[:, :, :-1] += down[:, :, 1:]
    return (both - 4 * x) / 12
