"""How alike two explanations are."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["cosine", "drift", "spearman", "ssim"]


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of the angle between explanations; 0 where one of them is all zero.

    Args:
        a: ``[*batch, features]``.
        b: ``[*batch, features]``.

    Returns:
        ``[*batch]``, from -1 to 1.
    """
    a, b = a.to(torch.float64), b.to(torch.float64)
    # Scaled first: squares of small relevance vanish.
    a, b = (x / x.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny) for x in (a, b))
    product = a.norm(dim=-1) * b.norm(dim=-1)
    return torch.where(product == 0, 0.0, (a * b).sum(-1) / product).clamp(-1.0, 1.0)


def drift(a: Tensor, b: Tensor) -> Tensor:
    """How far apart explanations are: one minus their cosine; 0 where both are all zero.

    Args:
        a: ``[*batch, features]``.
        b: ``[*batch, features]``.

    Returns:
        ``[*batch]``, from 0 to 2.
    """
    alike = (a == 0).all(-1) & (b == 0).all(-1)
    return torch.where(alike, 0.0, 1.0 - cosine(a, b))


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """Spearman's rank correlation; features of the same relevance share the mean of their ranks.

    Where one of the explanations is the same for all features it has no order, and the correlation is 0.

    Args:
        a: ``[*batch, features]``.
        b: ``[*batch, features]``.

    Returns:
        ``[*batch]``, from -1 to 1.
    """
    a, b = _ranks(a), _ranks(b)
    return cosine(a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True))


def _ranks(values: Tensor) -> Tensor:
    """Ranks ``[*batch, features]``, the mean of them among equals."""
    flat = values.reshape(-1, values.shape[-1]).contiguous()
    ordered = flat.sort(-1).values
    below = torch.searchsorted(ordered, flat)
    up_to = torch.searchsorted(ordered, flat, right=True)
    return ((below + up_to + 1).to(torch.float64) / 2).reshape(values.shape)


def ssim(a: Tensor, b: Tensor, window: int = 7) -> Tensor:
    """Structural similarity of two maps (Wang et al. 2004, eq. 13), mean over a sliding square of equal weights.

    Each map is divided by its largest size first, so that values lie between -1 and 1.

    Args:
        a: ``[*batch, height, width]``.
        b: ``[*batch, height, width]``.
        window: side of the square, in pixels; that of a smaller map, if it is smaller.

    Returns:
        ``[*batch]``, at most 1.
    """
    batch, window = a.shape[:-2], min(window, *a.shape[-2:])
    a, b = (_scaled(x) for x in (a, b))
    covers = window * window
    mean_a, mean_b, aa, bb, ab = (
        F.avg_pool2d(x.reshape(-1, 1, *x.shape[-2:]), window, stride=1) for x in (a, b, a * a, b * b, a * b)
    )
    unbiased = covers / max(1, covers - 1)
    var_a, var_b = unbiased * (aa - mean_a**2), unbiased * (bb - mean_b**2)
    covariance = unbiased * (ab - mean_a * mean_b)
    # (K1 L)^2 and (K2 L)^2, with the constants of the paper and the range L = 2.
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    alike = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    apart = (mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)
    return (alike / apart).mean((-3, -2, -1)).reshape(batch)


def _scaled(x: Tensor) -> Tensor:
    x = x.to(torch.float64)
    return x / x.abs().amax((-2, -1), keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
