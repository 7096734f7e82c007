"""Sensitivity-n: whether relevance adds up to what the removal of several features costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor, nn

from tdhook.evaluation.explaining import Explaining, Part, explaining
from tdhook.evaluation.intervals import Figures
from tdhook.evaluation.runs import Method
from tdhook.evaluation.similarity import cosine
from tdhook.perturbing.baselines import Baseline, Replacements
from tdhook.perturbing.features import Groups
from tdhook.targets import TargetLike

__all__ = ["SensitivityN", "sensitivity_n"]


@dataclass(frozen=True, eq=False)
class SensitivityN(Figures):
    """How well relevance foretells what the removal of features costs.

    Attributes:
        sizes: how many features were removed together.
        correlation: ``[*batch, sizes]``, Pearson's correlation of the summed relevance of what is removed and the drop
            of what is explained, over random subsets; 0 where one of them is the same for all subsets.
    """

    sizes: tuple[int, ...]
    correlation: Tensor
    trailing: ClassVar[int] = 1

    @property
    def mean(self) -> Tensor:
        """Mean over the batch, ``[sizes]``."""
        return self.correlation.reshape(-1, len(self.sizes)).mean(0)

    def figures(self) -> dict[str, Tensor]:
        """Correlations, of which there are intervals for each size."""
        return {"correlation": self.correlation}

    def to_dict(self) -> dict[str, object]:
        """Sizes, and means over the batch, as plain data."""
        return {"sizes": list(self.sizes), "correlation": self.mean.tolist()}


def sensitivity_n(
    module: nn.Module,
    td: TensorDictBase,
    method: Method | None = None,
    *,
    target: TargetLike = None,
    keys: Sequence[NestedKey] | None = None,
    groups: Groups = None,
    baseline: Baseline = 0.0,
    sizes: Sequence[int] | None = None,
    subsets: int = 100,
    data: TensorDictBase | None = None,
    attribution_key: NestedKey = "attr",
    batch_dims: int | None = None,
    chunk_size: int = 1024,
    seed: int = 0,
) -> SensitivityN:
    """Remove random subsets of features, and correlate what that costs with their relevance (Ancona et al. 2018).

    The relevance of a linear model that is complete, of the difference from the baseline, has a correlation of 1 for
    all sizes; no method can have that for a model that is not (their proposition 3). Where it falls off with the size
    tells how many features at once a map can be believed about.

    Args:
        module: the model, not explained.
        td: inputs, with any batch shape; and their relevance, if there is no ``method``.
        method: what explains them.
        target: what is explained; by default what ``method`` explains, or the only output there is.
        keys: inputs whose features are removed; by default all that have relevance.
        groups: entries that are one feature, whose relevance is added up.
        baseline: what a removed feature is replaced by (:data:`Baseline`).
        sizes: how many features are removed together; by default up to ten sizes, evenly on a logarithmic scale from 1
            to four fifths of the features.
        subsets: how many subsets of each size are drawn, for each element of the batch anew.
        data: what baselines ``"mean"`` and ``"sample"`` are taken of; by default ``td``.
        attribution_key: where relevance is.
        batch_dims: how many batch axes tell apart what is explained, as in
            :func:`~tdhook.evaluation.perturbation_curve`.
        chunk_size: how many inputs the model sees at once.
        seed: of all random numbers; global ones are left as they are.

    Raises:
        KeyError: a key or its relevance is missing.
        TypeError: an input is not floating-point.
        ValueError: the batch is empty, there are no two subsets of a size, or the target explains several outputs.
    """
    if subsets < 2:
        raise ValueError(f"a correlation is over several subsets, at least two; got subsets={subsets}")
    found: list[Tensor] = []
    chosen: tuple[int, ...] = ()
    replacements: Replacements | None = None
    with explaining(
        module,
        td,
        method,
        target=target,
        keys=keys,
        groups=groups,
        attribution_key=attribution_key,
        batch_dims=batch_dims,
        chunk_size=chunk_size,
        seed=seed,
    ) as each:
        source = each.data(data)
        for part in each.parts():
            if replacements is None:
                chosen = _sizes(sizes, part.features.count)
                draws = torch.Generator().manual_seed(seed + 1)
                replacements = Replacements(baseline, part.features, source, draws)
                # Rows draw one after the other, so that chunks change nothing: of each size by itself.
                lots = [torch.Generator().manual_seed(seed + 2 + size) for size in chosen]
            for some in part.split(max(1, chunk_size // subsets)):
                values, whole = replacements(some.rows), each.values(some.rows)
                each_size = [
                    _correlated(each, some, values, whole, size, subsets, lot)
                    for size, lot in zip(chosen, lots, strict=True)
                ]
                found.append(torch.stack(each_size, 1))
    return SensitivityN(chosen, each.shaped(found))


def _sizes(sizes: Sequence[int] | None, count: int) -> tuple[int, ...]:
    if count < 2:
        raise ValueError(
            "subsets are drawn from several features, and there is one: give groups of its entries"
        )
    if sizes is None:
        most = max(1, math.floor(0.8 * count))
        return tuple(sorted({round(most ** (i / 9)) for i in range(10)}))
    wrong = [size for size in sizes if not 1 <= size < count]
    if wrong or not sizes:
        raise ValueError(
            f"sizes of subsets of {count} features are 1 to {count - 1}, of which there are several; got "
            f"{', '.join(map(str, wrong)) or 'none'}"
        )
    return tuple(sizes)


def _correlated(
    each: Explaining,
    some: Part,
    baseline: dict[NestedKey, Tensor],
    whole: Tensor,
    size: int,
    subsets: int,
    lot: torch.Generator,
) -> Tensor:
    """The correlation for each of some rows, ``[rows]``."""
    count, features = len(some.rows), some.features
    relevance = some.total
    summed, dropped = [], []
    for copies in torch.arange(subsets).split(max(1, each.chunk_size // count)):
        lots = torch.rand(count, len(copies), features.count, generator=lot, dtype=torch.float64)
        removed = (lots <= lots.kthvalue(size, dim=-1, keepdim=True).values).to(relevance.device)
        summed.append(torch.where(removed, relevance[:, None], 0.0).sum(-1))
        inputs = each.copies(some.rows, len(copies))
        values = {key: x.repeat_interleave(len(copies), 0) for key, x in baseline.items()}
        changed = features.replaced(inputs, values, removed.flatten(0, 1))
        dropped.append(whole[:, None] - each.values(changed).reshape(count, -1))
    drop = torch.cat(dropped, 1)
    # Drops that differ by no more than outputs are rounded to do not differ.
    precision = max(torch.finfo(some.rows.get(key).dtype).eps for key in features.keys)
    rounding = 8 * precision * torch.maximum(whole.abs(), (whole[:, None] - drop).abs().amax(1))
    return cosine(_centred(torch.cat(summed, 1), 0.0), _centred(drop, rounding[:, None]))


def _centred(values: Tensor, rounding: Tensor | float) -> Tensor:
    """``[rows, draws]`` less their mean, zero where that is all rounding."""
    centred = values - values.mean(1, keepdim=True)
    spread = centred.abs().amax(1, keepdim=True)
    return torch.where(spread <= rounding + 1e-14 * values.abs().amax(1, keepdim=True), 0.0, centred)
