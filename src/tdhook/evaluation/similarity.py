"""How alike two explanations are."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["cosine", "drift", "kendall", "leading", "sign_agreement", "spearman", "ssim", "top_overlap"]


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


def kendall(a: Tensor, b: Tensor) -> Tensor:
    """Kendall's rank correlation (tau-b): pairs of features in the same order, less those in the opposite one.

    Divided by the geometric mean of the pairs that either explanation has an order for. Where one of them is the same
    for all features it has no order, and the correlation is 0. It takes ``n log(n)^2`` for ``n`` features.

    Args:
        a: ``[*batch, features]``.
        b: ``[*batch, features]``.

    Returns:
        ``[*batch]``, from -1 to 1.
    """
    batch, count = a.shape[:-1], a.shape[-1]
    a, b = (_ranks(x).reshape(-1, count) for x in (a, b))
    # In the order of a, and among equals in that of b, only pairs that are in the opposite order are inverted.
    by_b = b.argsort(-1)
    order = by_b.gather(-1, a.gather(-1, by_b).argsort(dim=-1, stable=True))
    inverted = _inversions(b.gather(-1, order))
    both = _tied_pairs(a * (2 * count + 1) + b)
    pairs = count * (count - 1) / 2
    ordered_a, ordered_b = pairs - _tied_pairs(a), pairs - _tied_pairs(b)
    same_less_opposite = ordered_a + ordered_b - pairs + both - 2 * inverted
    product = (ordered_a * ordered_b).sqrt()
    return torch.where(product == 0, 0.0, same_less_opposite / product).clamp(-1.0, 1.0).reshape(batch)


def _tied_pairs(ranks: Tensor) -> Tensor:
    """How many pairs share a rank, ``[rows]``."""
    ordered = ranks.sort(-1).values.contiguous()
    alike = torch.searchsorted(ordered, ordered, right=True) - torch.searchsorted(ordered, ordered)
    return (alike - 1).sum(-1).to(torch.float64) / 2


def _inversions(values: Tensor) -> Tensor:
    """How many pairs of ``values [rows, n]`` are in falling order, ``[rows]``: counted while merging sorted halves."""
    rows, count = values.shape
    found = values.new_zeros(rows)
    width = 1
    while width < count:
        blocks = -(-count // (2 * width))
        padded = F.pad(values, (0, 2 * width * blocks - values.shape[1]), value=torch.inf)
        left, right = padded.reshape(rows, blocks, 2, width).unbind(2)
        above = width - torch.searchsorted(left.contiguous(), right.contiguous(), right=True)
        found += above.flatten(1).sum(-1)
        values, width = padded.reshape(rows, blocks, -1).sort(-1).values.flatten(1), 2 * width
    return found


def top_overlap(a: Tensor, b: Tensor, count: int) -> Tensor:
    """The share of the most relevant features of one explanation that are such of the other, too.

    Where more features share the last place than there is room for, each is in by the chance that a lot would give it.

    Args:
        a: ``[*batch, features]``.
        b: ``[*batch, features]``.
        count: how many features are the most relevant ones.

    Returns:
        ``[*batch]``, from 0 to 1.

    Raises:
        ValueError: there are not so many features.
    """
    if not 1 <= count <= a.shape[-1]:
        raise ValueError(f"the {count} most relevant of {a.shape[-1]} features: give 1 to {a.shape[-1]}")
    size = torch.full(a.shape[:-1], count, device=a.device)
    return torch.minimum(leading(a, size), leading(b, size)).sum(-1) / count


def sign_agreement(a: Tensor, b: Tensor) -> Tensor:
    """The share of the features that both explanations give the same sign; zero is a sign of its own.

    Args:
        a: ``[*batch, features]``.
        b: ``[*batch, features]``.

    Returns:
        ``[*batch]``, from 0 to 1.
    """
    return (a.sign() == b.sign()).to(torch.float64).mean(-1)


def leading(values: Tensor, count: Tensor) -> Tensor:
    """Which features are among the largest: 1, 0, or for those that share the last places the chance of a lot.

    Args:
        values: ``[*batch, features]``.
        count: ``[*batch]``, how many are taken.

    Returns:
        ``[*batch, features]``, which adds up to ``count``.
    """
    flat = values.reshape(-1, values.shape[-1])
    ordered = flat.sort(-1, descending=True).values
    last = ordered.gather(-1, count.reshape(-1, 1) - 1)
    above, equal = flat > last, flat == last
    left = count.reshape(-1, 1) - above.sum(-1, keepdim=True)
    chance = left.to(torch.float64) / equal.sum(-1, keepdim=True)
    return (above + equal * chance).reshape(values.shape)


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
