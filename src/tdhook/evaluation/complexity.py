"""Complexity: how many features an explanation needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook.evaluation.explaining import given_relevance
from tdhook.evaluation.intervals import Figures
from tdhook.passes.rows import shaped_like
from tdhook.perturbing.features import Groups

__all__ = ["Complexity", "complexity"]


@dataclass(frozen=True, eq=False)
class Complexity(Figures):
    """How relevance is shared among features.

    Attributes:
        features: how many there are.
        sparseness: ``[*batch]``, the Gini index of the size of relevance (Chalasani et al. 2020): 0 where all features
            have as much, ``1 - 1 / features`` where one has all.
        entropy: ``[*batch]``, that of the shares, in nats (Bhatt et al. 2020, complexity).
        effective: ``[*batch]``, its exponential: so many equal features have that entropy, from 1 to ``features``.
    """

    features: int
    sparseness: Tensor
    entropy: Tensor
    effective: Tensor

    def figures(self) -> dict[str, Tensor]:
        """The three, by name."""
        return {"sparseness": self.sparseness, "entropy": self.entropy, "effective": self.effective}

    def to_dict(self) -> dict[str, float]:
        """Means over the batch."""
        return {name: values.mean().item() for name, values in self.figures().items()}


def complexity(
    explained: TensorDictBase,
    *,
    keys: Sequence[NestedKey] | None = None,
    groups: Groups = None,
    attribution_key: NestedKey = "attr",
    batch_dims: int | None = None,
) -> Complexity:
    """Measure how few features have most of the relevance, whatever its sign.

    A simple map is easily read. It need not be right: say what else was measured of it. One that is all zero singles
    nothing out, and counts as one that is the same everywhere.

    Args:
        explained: with relevance, of any batch shape.
        keys: inputs whose relevance is looked at, together; by default all that have some.
        groups: entries that are one feature, whose relevance is added up.
        attribution_key: where relevance is.
        batch_dims: how many batch axes tell apart what is explained; by default all.

    Raises:
        KeyError: a key or its relevance is missing.
        ValueError: the batch is empty, groups do not fit, or relevance is not finite.
    """
    part, axes = given_relevance(
        explained, keys=keys, groups=groups, attribution_key=attribution_key, batch_dims=batch_dims
    )
    size = part.total.abs()
    most = size.amax(1, keepdim=True)
    # Scaled first: sums of very small or large relevance leave the range.
    size = torch.where(most == 0, 1.0, size / torch.where(most == 0, 1.0, most))
    shares = size / size.sum(1, keepdim=True)
    count = shares.shape[1]
    place = torch.arange(1, count + 1, dtype=torch.float64, device=shares.device)
    sparseness = ((2 * place - count - 1) * shares.sort(1).values).sum(1) / count
    entropy = torch.special.entr(shares).sum(1)
    found = {
        "sparseness": sparseness.clamp(0.0, 1 - 1 / count),
        "entropy": entropy,
        "effective": entropy.exp().clamp(1.0, count),
    }
    return Complexity(
        count, **{name: shaped_like(each.cpu(), explained, axes) for name, each in found.items()}
    )
