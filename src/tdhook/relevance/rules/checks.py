"""A check of conservation at a single module."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor, nn

__all__ = ["raise_for_unconserved_rel_factory"]

Relevances: TypeAlias = "Tensor | tuple[Tensor | None, ...]"


def _total(relevances: Relevances) -> Tensor:
    several = relevances if isinstance(relevances, tuple) else (relevances,)
    return torch.stack([r.sum() for r in several if r is not None]).sum()


def raise_for_unconserved_rel_factory(
    atol: float = 1e-6, rtol: float = 1e-6
) -> Callable[[nn.Module, Relevances, Relevances], None]:
    """Make a hook for ``module.register_full_backward_hook`` that checks conservation.

    Args:
        atol: absolute tolerance of the sums.
        rtol: relative tolerance of the sums.

    Returns:
        ``hook(module, in_relevances, out_relevances)``, which raises ``RuntimeError`` where the sums differ.
    """

    def hook(module: nn.Module, in_relevances: Relevances, out_relevances: Relevances) -> None:
        arrived, given = _total(in_relevances), _total(out_relevances)
        if not torch.isclose(arrived, given, atol=atol, rtol=rtol):
            raise RuntimeError(
                f"Unconserved relevance at {type(module).__name__}: its outputs were given {given.item():.6g}, "
                f"its inputs received {arrived.item():.6g}"
            )

    return hook
