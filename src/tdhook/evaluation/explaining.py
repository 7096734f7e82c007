"""Explained rows: what measures go through, so many at once, under one question."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor, nn

from tdhook.evaluation.runs import Explainer, Method, axes_of, bound, quiet, relevance_of, target_of
from tdhook.passes.questions import Asked, asked
from tdhook.passes.rows import rows_of, shaped_like
from tdhook.perturbing.features import Features, Groups
from tdhook.targets import TargetLike

__all__ = ["Explaining", "Part", "explained_by", "explaining", "given_relevance"]


GroupsOf: TypeAlias = Callable[[Mapping[NestedKey, torch.Size]], Groups]
"""Groups, given the shapes of one element of each input."""


@dataclass(frozen=True, eq=False)
class Part:
    """Some rows, explained.

    Attributes:
        rows: ``[rows, *rest]``.
        features: of the inputs whose relevance is looked at.
        relevance: of these, by key, ``[rows, *shape]``.
    """

    rows: TensorDictBase
    features: Features
    relevance: Mapping[NestedKey, Tensor]

    @property
    def total(self) -> Tensor:
        """The relevance of each feature, ``[rows, features]``: the sum over its entries."""
        per_entry = self.features.by_entry(self.relevance)
        if self.features.alike:
            return per_entry
        return per_entry * self.features.extent.to(per_entry.device)

    def split(self, count: int) -> Iterator[Part]:
        """The same, so many rows at once."""
        for start in range(0, len(self.rows), count):
            some = slice(start, start + count)
            relevance = {key: value[some] for key, value in self.relevance.items()}
            yield Part(self.rows[some], self.features, relevance)


@dataclass(frozen=True, eq=False)
class Explaining:
    """All rows of a batch, a question about them, and what explains them.

    Attributes:
        td: the batch.
        axes: how many of its axes make rows.
        question: what is asked of the model.
        whole: the rows of the batch, with what was chosen.
        explain: writes relevance; none where it is there already.
        keys: inputs that are looked at; all that have relevance by default.
        groups: entries that are one feature, or what makes these of the shapes of the inputs.
        attribution_key: where relevance is.
        chunk_size: how many rows at once.
    """

    td: TensorDictBase
    axes: int
    question: Asked
    whole: TensorDictBase
    explain: Explainer | None
    keys: Sequence[NestedKey] | None
    groups: Groups | GroupsOf
    attribution_key: NestedKey
    chunk_size: int

    def parts(self) -> Iterator[Part]:
        """The rows, so many at once.

        Raises:
            KeyError: a key or its relevance is missing.
            TypeError: an input is not floating-point.
            ValueError: relevance is not finite, or has another shape than its input.
        """
        features = None
        for rows in self.whole.split(self.chunk_size):
            written = rows if self.explain is None else self.explain(rows.copy())
            relevance = relevance_of(written, self.attribution_key)
            if features is None:
                chosen = _chosen(relevance, self.keys)
                groups = self.groups
                if callable(groups):
                    groups = groups(
                        {key: rows.get(key).shape[1:] for key in chosen if key in rows.keys(True)}
                    )
                features = Features.of(rows, chosen, groups)
            yield Part(rows, features, _checked(relevance, features.keys, rows))

    def values(self, rows: TensorDictBase) -> Tensor:
        """What is explained, of rows as they are or changed: ``[rows]``."""
        return torch.cat(
            [self.question.values(self.question.outputs(part), part) for part in rows.split(self.chunk_size)]
        )

    def copies(self, rows: TensorDictBase, count: int) -> TensorDictBase:
        """So many copies of each row, one beside the other, ``[rows * count]``: what the answer depends on."""
        small = self.question.reads(rows)
        return small.unsqueeze(1).expand(len(small), count, *small.batch_size[1:]).flatten(0, 1)

    def data(self, given: TensorDictBase | None) -> TensorDictBase:
        """What means and samples are taken of, as rows: the batch, unless other data are given."""
        if given is None:
            return self.whole
        return rows_of(given, given.batch_dims - (self.td.batch_dims - self.axes))

    def shaped(self, parts: Sequence[Tensor]) -> Tensor:
        """What was found of each part, ``[rows, *rest]``, as ``[*batch, *rest]``."""
        return shaped_like(torch.cat(list(parts)).cpu(), self.td, self.axes)


@contextmanager
def explaining(
    module: nn.Module,
    td: TensorDictBase,
    method: Method | None,
    *,
    target: TargetLike,
    keys: Sequence[NestedKey] | None,
    groups: Groups | GroupsOf,
    attribution_key: NestedKey,
    batch_dims: int | None,
    chunk_size: int,
    seed: int,
    changes: bool = True,
) -> Iterator[Explaining]:
    """Ask one question about all rows of ``td``, and explain them; the model is left as it was.

    With ``changes`` it is asked about changed copies of them, too.

    Raises:
        ValueError: the batch is empty, or the target explains several outputs; or what is answered of a row depends on
            what lies beside it, as copies of rows will.
    """
    target = target_of(method, target)
    axes = axes_of(td, batch_dims, target)
    with quiet(module, seed):
        question, whole = asked(module, td, target, axes, chunk_size)
        if changes:
            question.look(whole)
        explain = None if method is None else bound(method, module, question.seeder, whole)
        yield Explaining(td, axes, question, whole, explain, keys, groups, attribution_key, chunk_size)


def explained_by(
    methods: Mapping[str, Method],
    module: nn.Module,
    td: TensorDictBase,
    *,
    target: TargetLike = None,
    keys: Sequence[NestedKey] | None = None,
    attribution_key: NestedKey = "attr",
    batch_dims: int | None = None,
    chunk_size: int = 1024,
    seed: int = 0,
) -> dict[str, TensorDictBase]:
    """The explanations of several methods, of the same question.

    What the target chooses by what the model answers is chosen once for all of them.

    Args:
        methods: by name.
        module: the model, not explained.
        td: inputs, with any batch shape.
        target: what is explained; by default what each method explains.
        keys: inputs whose relevance is kept; by default all that have some.
        attribution_key: where methods write relevance, and where it is here.
        batch_dims: how many batch axes tell apart what is explained, as in
            :func:`~tdhook.evaluation.perturbation_curve`.
        chunk_size: how many inputs the model sees at once.
        seed: of random numbers that the model or a method draws; global ones are left as they are.

    Returns:
        By name, ``td`` with the relevance of its inputs, ``[*batch]``. Tensors of ``td`` are shared.

    Raises:
        KeyError: a key or its relevance is missing.
        TypeError: an input is not floating-point.
        ValueError: the batch is empty, or the target explains several outputs.
    """
    found: dict[str, TensorDictBase] = {}
    for name, method in methods.items():
        with explaining(
            module,
            td,
            method,
            target=target,
            keys=keys,
            groups=None,
            attribution_key=attribution_key,
            batch_dims=batch_dims,
            chunk_size=chunk_size,
            seed=seed,
            changes=False,
        ) as each:
            parts = list(each.parts())
        # Written beside the inputs, without what was there before.
        found[name] = td.exclude(attribution_key)
        below = TensorDict(batch_size=td.batch_size)
        for key in parts[0].features.keys:
            below.set(key, torch.cat([part.relevance[key] for part in parts]).reshape(td.get(key).shape))
        found[name].set(attribution_key, below)
    return found


def given_relevance(
    td: TensorDictBase,
    *,
    keys: Sequence[NestedKey] | None,
    groups: Groups,
    attribution_key: NestedKey,
    batch_dims: int | None,
) -> tuple[Part, int]:
    """The relevance that is there already, of all rows, where no model is asked.

    Returns:
        The rows of relevance; how many batch axes make rows.

    Raises:
        KeyError: a key or its relevance is missing.
        ValueError: the batch is empty, or relevance is not finite, or has another shape than its input.
    """
    axes = axes_of(td, batch_dims, None)
    rows = rows_of(td, axes)
    relevance = relevance_of(rows, attribution_key)
    chosen = _chosen(relevance, keys)
    relevance = _checked(relevance, chosen, rows)
    only = TensorDict(batch_size=rows.batch_size)
    for key in chosen:
        only.set(key, relevance[key])
    return Part(only, Features.of(only, chosen, groups), relevance), axes


def _chosen(relevance: Mapping[NestedKey, Tensor], keys: Sequence[NestedKey] | None) -> list[NestedKey]:
    return list(relevance) if keys is None else [unravel_key(key) for key in keys]


def _checked(
    relevance: Mapping[NestedKey, Tensor], keys: Sequence[NestedKey], rows: TensorDictBase
) -> dict[NestedKey, Tensor]:
    """The relevance of ``keys``, finite and of the shapes of these inputs where they are there."""
    for key in keys:
        if key not in relevance:
            raise KeyError(f"{key!r} has no relevance; there is that of {', '.join(map(repr, relevance))}")
        value = rows.get(key, None)
        if value is not None and relevance[key].shape != value.shape:
            raise ValueError(
                f"the relevance of {key!r} has shape {list(relevance[key].shape)} for inputs of shape "
                f"{list(value.shape)}: explain one output at a time"
            )
        if not bool(relevance[key].isfinite().all()):
            raise ValueError(
                f"relevance has NaN or infinite values, which have no order and no sum: that of {key!r}"
            )
    return {key: relevance[key] for key in keys}
