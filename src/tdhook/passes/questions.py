"""Questions: what is asked of a model, the same for every changed input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from tensordict import TensorDictBase
from tensordict.utils import unravel_key
from torch import Tensor, nn

from tdhook.models.entries import dense_copy, plain
from tdhook.models.model import Model
from tdhook.passes.rows import rows_of
from tdhook.targets import AtStep, Contrast, Seeder, Seeds, Target, TargetLike, as_seeder
from tdhook.targets.outputs import Selection
from tdhook.targets.pinned import pin

__all__ = ["Asked", "asked"]


@dataclass(frozen=True)
class Asked:
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
) -> tuple[Asked, TensorDictBase]:
    """Ask ``target`` of ``module`` for the rows of ``td``, and for changed copies of these.

    What the target chooses by what the model answers (``"argmax"``, ``"action"``) is chosen once, for the inputs as
    they are.

    Args:
        module: the model.
        td: inputs, ``[*batch]``.
        target: what is explained.
        axes: how many batch axes make rows.
        chunk_size: how many inputs the model sees at once.

    Returns:
        The question, and the rows of ``td`` (tensors are shared) with what was chosen.

    Raises:
        ValueError: several outputs are explained, or it is not clear which.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size is the number of inputs in one pass, at least 1; got {chunk_size}")
    td = dense_copy(plain(td))
    model, rows, seeder = Model.of(module), rows_of(td, axes).copy(), as_seeder(target)
    if target is not None and not isinstance(seeder, Selection | Contrast | AtStep):
        return Asked(model, seeder, seeder), rows
    parts: list[Any] = [model.run(part.copy())[0] for part in rows.split(chunk_size)]
    answers = cast(TensorDictBase, torch.cat(parts))
    outputs = answers.reshape(td.batch_size) if td.batch_dims else answers[0]
    if target is None:
        seeder = _only(outputs)
    derived = seeder.derive(outputs, td)
    _require_one(seeder(derived, td, "gradient"), seeder)
    pinned, chosen = pin(seeder, derived, td)
    for key, value in chosen.items():
        rows.set(key, value.reshape(*rows.batch_size, *value.shape[td.batch_dims :]))
    return Asked(model, seeder, pinned), rows


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
