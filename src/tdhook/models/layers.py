"""Modules for operations that a rule could not reach otherwise."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["Sum"]


class Sum(nn.Module):
    """Sum along one axis, as a module.

    Args:
        dim: the axis that is summed away.

    Shape: ``[*, n, *]`` to ``[*, *]``, where ``n`` is the size of ``dim``.
    """

    def __init__(self, dim: int = -1) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, input: Tensor) -> Tensor:
        """Sum ``input`` along ``dim``."""
        return input.sum(dim=self.dim)

    def extra_repr(self) -> str:
        """Show the axis in ``repr``."""
        return f"dim={self.dim}"
