"""Running a model again and again on changed inputs, while what is asked of it stays the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import torch
from tensordict import TensorDictBase
from tensordict.nn import InteractionType, set_interaction_type
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor, nn

from tdhook.contexts.attribution import Attribution
from tdhook.conventions import Convention
from tdhook.models.model import Model
from tdhook.models.state import restored
from tdhook.targets import AtStep, Contrast, Seeder, Seeds, Target, TargetLike, as_seeder
from tdhook.targets.outputs import Selection

__all__ = [
    "Explainer",
    "Method",
    "Question",
    "asked",
    "axes_of",
    "bound",
    "quiet",
    "relevance_of",
    "rows_of",
    "shaped_like",
    "target_of",
]

Explainer: TypeAlias = Callable[[TensorDictBase], TensorDictBase]
"""Writes the relevance of ``key`` under ``("attr", key)`` into a TensorDict."""

Method: TypeAlias = "Attribution | Callable[[nn.Module], Explainer]"
"""An attribution method (``LRP(...)``, ``Gradient()``), or a function that makes an explainer of a model.

What a method explains is given with ``target``; a function decides that by itself.
"""

ASKED = "_asked"
"""The entry under which is kept what is asked, while inputs change."""


@contextmanager
def quiet(model: nn.Module, seed: int = 0) -> Iterator[None]:
    """Run ``model`` without gradients, with the most likely actions, and leave buffers and random state as they were.

    Within, global random numbers (dropout in training mode) follow ``seed``.
    """
    with torch.no_grad(), restored(model), set_interaction_type(InteractionType.DETERMINISTIC):
        seed_globally(seed)
        yield


def seed_globally(seed: int) -> None:
    """Seed the generators whose state :func:`quiet` puts back."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


def axes_of(td: TensorDictBase, batch_dims: int | None, target: TargetLike) -> int:
    """How many batch axes tell apart what is explained: all, by default, or all but time where one step is explained.

    Raises:
        ValueError: there is nothing in ``td``, or it does not have so many axes.
    """
    if batch_dims is None:
        batch_dims = td.batch_dims - isinstance(target, AtStep)
    if not 0 <= batch_dims <= td.batch_dims:
        raise ValueError(
            f"batch_dims={batch_dims} of a TensorDict of batch size {list(td.batch_size)}: give 0 to {td.batch_dims}"
        )
    if 0 in td.batch_size:
        raise ValueError(
            f"there is nothing to evaluate: the TensorDict is empty (batch size {list(td.batch_size)})"
        )
    return batch_dims


def rows_of(td: TensorDictBase, axes: int) -> TensorDictBase:
    """``td`` with its first ``axes`` batch axes made one: a row for each thing to explain."""
    return td.reshape(-1, *td.batch_size[axes:]) if axes else td.unsqueeze(0)


def shaped_like(values: Tensor, td: TensorDictBase, axes: int) -> Tensor:
    """``values [rows, *rest]`` of :func:`rows_of` as ``[*batch, *rest]``."""
    return values.reshape((*td.batch_size[:axes], *values.shape[1:]))


@dataclass(frozen=True, eq=False)
class Pinned(Seeder):
    """A target that has chosen: it explains what it explained of the inputs as they were, whatever they are now.

    Attributes:
        of: the target.
        keys: what it explains; with what weights is an entry of the rows.
        kept: entries, chosen by the model, that it computes with; their values are entries of the rows.
    """

    of: Seeder
    keys: tuple[NestedKey, ...]
    kept: tuple[NestedKey, ...]

    @property
    def entries(self) -> list[NestedKey] | None:
        """Those of the target, and what was kept."""
        own: list[NestedKey] = [(ASKED, f"weight {i}") for i in range(len(self.keys))]
        own += [(ASKED, f"entry {i}") for i in range(len(self.kept))]
        entries = self.of.entries
        return None if entries is None else [*entries, *own]

    @property
    def writes(self) -> Any:
        """What the target computes."""
        return self.of.writes

    def derive(self, outputs: TensorDictBase, inputs: TensorDictBase) -> TensorDictBase:
        """Let the target compute, with the entries as they were."""
        if not self.of.writes:
            return outputs
        before = outputs.copy()
        for i, key in enumerate(self.kept):
            before.set(key, inputs.get((ASKED, f"entry {i}")))
        derived = outputs.copy()
        computed = self.of.derive(before, inputs)
        for key in self.of.writes:
            derived.set(key, computed.get(key))
        return derived

    def __call__(self, outputs: TensorDictBase, inputs: TensorDictBase, flow: Convention) -> Seeds:
        """The seeds, with the weights as they were."""
        tensors = [outputs.get(key) for key in self.keys]
        weights = [inputs.get((ASKED, f"weight {i}")).to(z) for i, z in enumerate(tensors)]
        if flow == "relevance":
            # An output of weight zero may be infinite (masked logits).
            weights = [
                torch.where(w == 0, 0.0, w * z.detach()) for w, z in zip(weights, tensors, strict=True)
            ]
        return Seeds(list(self.keys), tensors, weights)


@dataclass(frozen=True)
class Question:
    """What is asked of a model, the same for every input.

    Attributes:
        model: what is asked.
        given: what the caller wants to be explained.
        seeder: the same, with its choice made.
    """

    model: Model
    given: Seeder
    seeder: Seeder

    def outputs(self, rows: TensorDictBase) -> TensorDictBase:
        """What the model writes for ``rows``, and what the target computes of it."""
        return self.seeder.derive(self.model.run(rows.copy())[0], rows)

    def seeds(self, outputs: TensorDictBase, rows: TensorDictBase) -> Seeds:
        """What is explained, and its weights."""
        seeds = self.seeder(outputs, rows, "gradient")
        _require_one(seeds, self.given)
        return seeds

    def values(self, outputs: TensorDictBase, rows: TensorDictBase) -> Tensor:
        """The value that is explained, ``[rows]``: weights times outputs, summed."""
        seeds = self.seeds(outputs, rows)
        total = torch.zeros(len(rows), dtype=torch.float64, device=seeds.tensors[0].device)
        for z, weight in zip(seeds.tensors, seeds.grads, strict=True):
            share = torch.where(weight == 0, 0.0, weight * z).to(torch.float64)
            total = total + share.reshape(len(rows), -1).sum(1)
        return total

    def reads(self, rows: TensorDictBase) -> TensorDictBase:
        """Those entries of ``rows`` that the answer depends on."""
        entries = self.seeder.entries
        if entries is None:
            return rows.exclude("attr")
        kept = dict.fromkeys(unravel_key(key) for key in (*self.model.runner.in_keys, *entries))
        return rows.select(*kept, strict=False)


def asked(
    module: nn.Module, td: TensorDictBase, target: TargetLike, axes: int, chunk_size: int
) -> tuple[Question, TensorDictBase]:
    """Ask ``target`` of ``module`` for the rows of ``td``, and for changed copies of these.

    What the target chooses by what the model answers (``"argmax"``, ``"action"``) is chosen once, for the inputs as
    they are.

    Args:
        module: the model.
        td: inputs.
        target: what is explained.
        axes: how many batch axes make rows.
        chunk_size: how many inputs the model sees at once.

    Returns:
        The question, and the rows of ``td`` (tensors are shared) with what was chosen.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size is the number of inputs in one pass, at least 1; got {chunk_size}")
    model, rows, seeder = Model.of(module), rows_of(td, axes).copy(), as_seeder(target)
    if target is not None and not isinstance(seeder, Selection | Contrast | AtStep):
        return Question(model, seeder, seeder), rows
    parts: list[Any] = [model.run(part.copy())[0] for part in rows.split(chunk_size)]
    answers = cast(TensorDictBase, torch.cat(parts))
    outputs = answers.reshape(td.batch_size) if td.batch_dims else answers[0]
    if target is None:
        seeder = _only(outputs)
    derived = seeder.derive(outputs, td)
    seeds = seeder(derived, td, "gradient")
    _require_one(seeds, seeder)
    for i, weight in enumerate(seeds.grads):
        rows.set((ASKED, f"weight {i}"), weight.reshape(*rows.batch_size, *weight.shape[td.batch_dims :]))
    kept = [key for key in seeder.entries or () if _is_choice(key, outputs)]
    for i, key in enumerate(kept):
        rows.set((ASKED, f"entry {i}"), answers.get(key))
    return Question(model, seeder, Pinned(seeder, tuple(seeds.keys), tuple(kept))), rows


def _only(outputs: TensorDictBase) -> Target:
    floating = [key for key, z in outputs.items(True, True) if z.is_floating_point()]
    if len(floating) != 1:
        raise ValueError(
            "which output is to be evaluated? Give target=Target(key); the module wrote "
            f"{', '.join(map(repr, floating)) or 'none that is floating-point'}"
        )
    return Target(floating[0])


def _require_one(seeds: Seeds, target: Seeder) -> None:
    if seeds.several is not None:
        raise ValueError(
            f"one output is evaluated at a time, and {target!r} explains several: name one of them"
        )


def _is_choice(key: NestedKey, outputs: TensorDictBase) -> bool:
    """Whether an entry is what the model chose, and not a value that it computed."""
    value = outputs.get(key, None)
    if value is None:
        return False
    last = key if isinstance(key, str) else key[-1]
    return not value.is_floating_point() or last == "action"


def bound(method: Method, module: nn.Module, target: TargetLike) -> Explainer:
    """An explainer of ``module`` by ``method``, for ``target``."""
    if isinstance(method, Attribution):
        explaining: Any = method if target is None else cast(Any, method).explaining(target)
        return explaining.wrap(module)  # type: ignore[no-any-return]
    explain = method(module)

    def with_gradients(td: TensorDictBase) -> TensorDictBase:
        with torch.enable_grad():
            return explain(td)

    return with_gradients


def target_of(method: Method | None, target: TargetLike) -> TargetLike:
    """What is explained: ``target``, or else what ``method`` says."""
    return getattr(method, "target", None) if target is None else target


def relevance_of(td: TensorDictBase, attribution_key: NestedKey) -> dict[NestedKey, Tensor]:
    """The relevance that is written in ``td``, by the key that it belongs to.

    Raises:
        KeyError: there is none.
    """
    below = td.get(attribution_key, None)
    if not isinstance(below, TensorDictBase):
        known = ", ".join(sorted(map(str, td.exclude(ASKED).keys(True, True))))
        raise KeyError(
            f"there is no relevance under {attribution_key!r}; the TensorDict has {known}. Explain it first, or give "
            "a method"
        )
    return dict(below.items(True, True))
