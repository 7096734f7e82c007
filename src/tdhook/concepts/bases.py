"""Bases: dictionaries that are a matrix of components, given, or found in activations."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Basis", "NonNegativeBasis", "non_negative_factors", "principal_components"]

# Rounds over the components, after which non-negative coordinates hardly change.
_ROUNDS = 50


class Basis(nn.Module):
    """Coordinates in a basis: ``f`` such that ``mean + f @ components`` is as near as can be to what is encoded.

    Of orthonormal components, that is ``(h - mean) @ components.T``.

    Args:
        components: ``[features, width]``, linearly independent.
        mean: ``[width]``, what stands for no feature at all; by default zero.

    Raises:
        ValueError: the shapes do not fit, or one component is a sum of others.
    """

    components: Tensor
    mean: Tensor | None
    inverse: Tensor

    def __init__(self, components: Tensor, mean: Tensor | None = None) -> None:
        super().__init__()
        components = _matrix(components, "components", "[features, width]")
        if mean is not None and mean.shape != components.shape[1:]:
            raise ValueError(
                f"the mean of a basis of components {list(components.shape)} is of shape "
                f"{[components.shape[1]]}, got {list(mean.shape)}"
            )
        rank = int(torch.linalg.matrix_rank(components))
        if rank < len(components):
            raise ValueError(
                f"{len(components)} components of rank {rank} are no basis: coordinates in them are not unique; leave "
                "out those that are sums of others"
            )
        self.register_buffer("components", components)
        self.register_buffer("mean", None if mean is None else mean.detach().clone())
        self.register_buffer("inverse", torch.linalg.pinv(components))

    def extra_repr(self) -> str:
        """How many components there are, and of what width."""
        return f"{self.components.shape[0]} components of width {self.components.shape[1]}"

    def encode(self, h: Tensor) -> Tensor:
        """``[..., width] -> [..., features]``."""
        return (h if self.mean is None else h - self.mean) @ self.inverse

    def decode(self, features: Tensor) -> Tensor:
        """``[..., features] -> [..., width]``."""
        made = features @ self.components
        return made if self.mean is None else made + self.mean


class NonNegativeBasis(nn.Module):
    """Coordinates of which none is negative: the nearest ``f @ components`` with ``f >= 0``.

    Which of them are zero is found without gradient, as the largest entries are of a maximum; the others are linear in
    what is encoded.

    Args:
        components: ``[features, width]``.
        rounds: over the components, in search of those that are zero.

    Raises:
        ValueError: components are of another shape, or one of them is zero.
    """

    components: Tensor

    def __init__(self, components: Tensor, rounds: int = _ROUNDS) -> None:
        super().__init__()
        components = _matrix(components, "components", "[features, width]")
        if not bool(components.any(1).all()):
            raise ValueError("a component of zeros has no coordinate: leave it out")
        self.register_buffer("components", components)
        self.rounds = rounds

    def extra_repr(self) -> str:
        """How many components there are, and of what width."""
        return f"{self.components.shape[0]} components of width {self.components.shape[1]}"

    def encode(self, h: Tensor) -> Tensor:
        """``[..., width] -> [..., features]``."""
        products = h @ self.components.T
        gram = self.components @ self.components.T
        with torch.no_grad():
            present = (_descended(products, gram, self.rounds) > 0).to(h.dtype)
            # Of those that are zero, the system has the row of the identity.
            system = gram * present.unsqueeze(-1) * present.unsqueeze(-2) + torch.diag_embed(1 - present)
            inverse = torch.linalg.pinv(system, hermitian=True) * present.unsqueeze(-2)
        return torch.relu((inverse @ products.unsqueeze(-1)).squeeze(-1))

    def decode(self, features: Tensor) -> Tensor:
        """``[..., features] -> [..., width]``."""
        return features @ self.components


def principal_components(activations: Tensor, n: int, *, center: bool = True) -> Basis:
    """The basis of the ``n`` directions in which activations vary most, the first most of all.

    Args:
        activations: ``[samples, width]``, or with more leading axes.
        n: how many components are kept.
        center: whether they vary around their mean; else around zero.

    Raises:
        ValueError: there are not as many.
    """
    rows = _rows(activations, n)
    mean = rows.mean(0) if center else None
    _, _, directions = torch.linalg.svd(rows if mean is None else rows - mean, full_matrices=False)
    directions = directions[:n]
    # Of each direction and its opposite, the one is taken in which the largest entry is positive.
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    return Basis(directions * largest.sign(), mean)


def non_negative_factors(
    activations: Tensor, n: int, *, rounds: int = 200, seed: int = 0
) -> NonNegativeBasis:
    """``n`` components of which activations are sums: non-negative matrix factorisation (Lee and Seung 1999).

    Factors are found by hierarchical alternating least squares (Cichocki and Phan 2009). Components are of length one.

    Args:
        activations: ``[samples, width]``, or with more leading axes; none is negative.
        n: how many components there are.
        rounds: of the search.
        seed: of the factors that it begins with.

    Raises:
        ValueError: activations are negative, or there are not as many components.
    """
    rows = _rows(activations, n)
    if bool((rows < 0).any()):
        raise ValueError(
            "activations that are negative are no sum of non-negative parts: factor what comes behind a ReLU, or take "
            "principal_components"
        )
    generator = torch.Generator().manual_seed(seed)
    scale = (rows.mean() / n).sqrt().clamp(min=torch.finfo(rows.dtype).tiny)
    start = torch.rand(n, rows.shape[1], generator=generator, dtype=torch.float64)
    components = start.to(rows) * scale
    weights = torch.rand(len(rows), n, generator=generator, dtype=torch.float64).to(rows) * scale
    for _ in range(rounds):
        weights = _descended(rows @ components.T, components @ components.T, 1, weights)
        components = _descended((weights.T @ rows).T, weights.T @ weights, 1, components.T).T
    lengths = components.norm(dim=1, keepdim=True)
    found = components[lengths.squeeze(1) > 0] / lengths[lengths.squeeze(1) > 0]
    if len(found) < n:
        raise ValueError(
            f"the activations are sums of {len(found)} components: ask for no more, and not for {n}"
        )
    return NonNegativeBasis(found)


def _descended(products: Tensor, gram: Tensor, rounds: int, start: Tensor | None = None) -> Tensor:
    """Non-negative ``f`` that minimise ``1/2 f G f - f p``, one coordinate after the other.

    Args:
        products: ``p``, ``[..., features]``.
        gram: ``G``, ``[features, features]``.
        rounds: over all coordinates.
        start: where to begin, by default at zero.
    """
    found = list(torch.zeros_like(products).unbind(-1) if start is None else start.unbind(-1))
    inverse = 1 / gram.diagonal().clamp(min=torch.finfo(gram.dtype).tiny)
    for _ in range(rounds):
        for k in range(len(found)):
            rest = products[..., k] - torch.stack(found, -1) @ gram[:, k]
            found[k] = (found[k] + rest * inverse[k]).clamp(min=0)
    return torch.stack(found, -1)


def _matrix(given: object, name: str, shape: str) -> Tensor:
    if not isinstance(given, Tensor) or given.dim() != 2 or not given.is_floating_point():
        what = list(given.shape) if isinstance(given, Tensor) else type(given).__name__
        raise ValueError(f"{name} are floating-point numbers {shape}, got {what}")
    return given.detach().clone()


def _rows(activations: object, n: int) -> Tensor:
    if not isinstance(activations, Tensor) or activations.dim() < 2 or not activations.is_floating_point():
        what = list(activations.shape) if isinstance(activations, Tensor) else type(activations).__name__
        raise ValueError(f"activations are floating-point numbers [..., width], got {what}")
    rows = activations.detach().flatten(0, -2)
    if not 1 <= n <= min(rows.shape):
        raise ValueError(
            f"of {rows.shape[0]} activations of width {rows.shape[1]} there are 1 to {min(rows.shape)} components, got "
            f"n={n}"
        )
    return rows
