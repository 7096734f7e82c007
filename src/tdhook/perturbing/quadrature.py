"""Quadrature: where on the way from one value to another to look, and how much each look counts."""

from __future__ import annotations

import torch

__all__ = ["gauss_legendre"]


def gauss_legendre(count: int) -> list[tuple[float, float]]:
    """Places in ``[0, 1]`` and their weights, which sum to one (Golub and Welsch 1969).

    Exact for polynomials of degree below ``2 count``.

    Raises:
        ValueError: there is no place.
    """
    if count < 1:
        raise ValueError(f"at least one gradient is averaged, got steps={count}")
    k = torch.arange(1, count, dtype=torch.float64)
    beside = torch.diag(k / torch.sqrt(4 * k.square() - 1), 1)
    places, vectors = torch.linalg.eigh(beside + beside.T)
    return list(zip(((places + 1) / 2).tolist(), vectors[0].square().tolist(), strict=True))
