"""Agreement: whether methods say the same of the same inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook.evaluation.explaining import given_relevance
from tdhook.evaluation.intervals import Figures
from tdhook.evaluation.randomisation import Similarity
from tdhook.evaluation.similarity import kendall, sign_agreement, spearman, top_overlap
from tdhook.passes.rows import shaped_like
from tdhook.perturbing.features import Groups

__all__ = ["Agreement", "agreement"]


@dataclass(frozen=True, eq=False)
class Agreement(Figures):
    """How alike the explanations of several methods are.

    Attributes:
        methods: their names.
        similarity: ``[*batch, methods, methods]`` by measure.
    """

    methods: tuple[str, ...]
    similarity: dict[str, Tensor]
    trailing: ClassVar[int] = 2

    def figures(self) -> dict[str, Tensor]:
        """Similarity by measure, of which there are intervals for each pair."""
        return self.similarity

    def mean(self, measure: str = "spearman") -> Tensor:
        """Mean over the batch, ``[methods, methods]``."""
        count = len(self.methods)
        return self.similarity[measure].reshape(-1, count, count).mean(0)

    def between(self, one: str, other: str, measure: str = "spearman") -> Tensor:
        """How alike two of them are, ``[*batch]``.

        Raises:
            KeyError: there is no such method.
        """
        for name in (one, other):
            if name not in self.methods:
                raise KeyError(f"there is no {name!r} among {', '.join(map(repr, self.methods))}")
        return self.similarity[measure][..., self.methods.index(one), self.methods.index(other)]

    def to_dict(self) -> dict[str, object]:
        """Means over the batch, by measure, method and method."""
        return {
            name: {
                one: dict(zip(self.methods, row, strict=True))
                for one, row in zip(self.methods, self.mean(name).tolist(), strict=True)
            }
            for name in self.similarity
        }


def agreement(
    explanations: Mapping[str, TensorDictBase],
    *,
    top: int | None = None,
    absolute: bool = False,
    measures: Mapping[str, Similarity] | None = None,
    keys: Sequence[NestedKey] | None = None,
    groups: Groups = None,
    attribution_key: NestedKey = "attr",
    batch_dims: int | None = None,
    chunk_size: int = 1024,
) -> Agreement:
    """Compare explanations with each other, pair by pair (Krishna et al. 2022).

    That methods agree does not make them right, and where they do not, at most one is. Explanations should be of the
    same question: :func:`explained_by` sees to that.

    Args:
        explanations: by the name of the method, TensorDicts with relevance, all of the same batch shape.
        top: how many features are the most relevant ones; by default a tenth of them, rounded up.
        absolute: whether features are ordered by the size of their relevance, whatever its sign; signs are compared as
            they are.
        measures: how explanations are compared, by name, functions of relevance that do not mind which of two comes
            first; by default rank correlations ``"spearman"`` and ``"kendall"``, ``"top"``, the overlap of the most
            relevant features, and ``"sign"``, the share of features with the same sign.
        keys: inputs whose relevance is compared, together; by default all that have some.
        groups: entries that are one feature, whose relevance is added up.
        attribution_key: where relevance is.
        batch_dims: how many batch axes tell apart what is explained; by default all.
        chunk_size: how many elements are compared at once.

    Raises:
        KeyError: a key or its relevance is missing.
        ValueError: there are no two explanations, or these are of different batches or features.
    """
    if len(explanations) < 2:
        raise ValueError(
            f"explanations of at least two methods are compared; got {', '.join(explanations) or 'none'}"
        )
    names, maps, axes = tuple(explanations), [], 0
    first = explanations[names[0]]
    chosen = keys
    for name, explained in explanations.items():
        if explained.batch_size != first.batch_size:
            raise ValueError(
                f"{name!r} explains a batch of size {list(explained.batch_size)}, and {names[0]!r} one of "
                f"{list(first.batch_size)}"
            )
        part, axes = given_relevance(
            explained, keys=chosen, groups=groups, attribution_key=attribution_key, batch_dims=batch_dims
        )
        chosen = part.features.keys  # in the order of the first
        maps.append(part.total)
        if maps[-1].shape != maps[0].shape:
            raise ValueError(
                f"{name!r} has relevance of {maps[-1].shape[1]} features, and {names[0]!r} of {maps[0].shape[1]}"
            )
    if measures is None:
        measures = _measures(-(-maps[0].shape[1] // 10) if top is None else top, absolute)
    pairs = [(i, j) for i in range(len(names)) for j in range(i, len(names))]
    found = {
        measure: torch.empty(len(maps[0]), len(names), len(names), dtype=torch.float64)
        for measure in measures
    }
    for measure, alike in measures.items():
        for i, j in pairs:
            parts = zip(maps[i].split(chunk_size), maps[j].split(chunk_size), strict=True)
            value = torch.cat([alike(a, b) for a, b in parts]).to("cpu", torch.float64)
            found[measure][:, i, j] = found[measure][:, j, i] = value
    return Agreement(names, {name: shaped_like(values, first, axes) for name, values in found.items()})


def _measures(top: int, absolute: bool) -> dict[str, Similarity]:
    def ordered(alike: Similarity) -> Similarity:
        return (lambda a, b: alike(a.abs(), b.abs())) if absolute else alike

    return {
        "spearman": ordered(spearman),
        "kendall": ordered(kendall),
        "top": ordered(lambda a, b: top_overlap(a, b, top)),
        "sign": sign_agreement,
    }
