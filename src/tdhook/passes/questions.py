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
from tdhook.models.state import Memory
from tdhook.passes.rows import parting, rows_of
from tdhook.targets import AtStep, Contrast, Seeder, Seeds, Target, TargetLike, as_seeder
from tdhook.targets.outputs import Selection
from tdhook.targets.pinned import pin

__all__ = ["Asked", "asked"]

_LOOKED = 8


@dataclass(frozen=True)
class Asked:
    """What is asked of a model, the same for every input.

    Attributes:
        model: what is asked.
        given: what the caller wants to be explained.
        seeder: the same, with its choice made.
        memory: what the model holds, which it finds the same in each run.
    """

    model: Model
    given: Seeder
    seeder: Seeder
    memory: Memory

    def outputs(self, rows: TensorDictBase) -> TensorDictBase:
        """What the model writes for ``rows``, and what the target computes of it."""
        with self.memory.kept(always=True):
            return self.seeder.derive(self.model.tried(rows), rows)

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

    def look(self, rows: TensorDictBase) -> None:
        """See that what is answered of a row does not depend on what lies beside it, as copies of rows will.

        Some rows lie beside halves of them, and the first and the last of these are asked beside themselves alone. Then
        some of them are halves, in sets that have each of them and not another one, for each pair. Where a model draws
        random numbers nothing is seen.

        Raises:
            ValueError: it does.
        """
        some = self.reads(rows[:_LOOKED])
        halves = some.copy()
        for key in self.model.runner.in_keys:
            value = some.get(key, None)
            if isinstance(value, Tensor) and value.is_floating_point():
                halves.set(key, value / 2)
        together = cast(TensorDictBase, torch.cat([some, halves]))
        with self.memory.kept(always=True):
            chance = torch.get_rng_state()
            outputs = self.seeder.derive(self.model.tried(together), together)
            if not torch.equal(chance, torch.get_rng_state()):
                return
        values, count = self.values(outputs, together), len(some)
        reach = torch.finfo(torch.float32).eps ** 0.5 * values.abs().max()
        # Each by itself, though twice: one row alone some layers refuse.
        twice = [[number, number] for number in (0, 2 * count - 1)]
        place = torch.arange(count)
        parted = [torch.where(where, place + count, place).tolist() for where in parting(count)]
        for numbers in (*twice, *parted):
            asked = together[numbers]
            found = self.values(self.outputs(asked), asked)
            if bool(((found - values[numbers]).abs() > reach).any()):
                raise ValueError(
                    "what the model answers of a row depends on what lies beside it, where copies of rows are to lie "
                    "side by side: call eval() on a model that normalises over the batch; say by batch_dims= which "
                    "axes tell apart what is explained, where the others belong together, as steps of a sequence"
                )

    def reads(self, rows: TensorDictBase) -> TensorDictBase:
        """Those entries of ``rows`` that the answer depends on."""
        entries = self.seeder.entries
        if entries is None:
            return rows.exclude("attr")
        kept = dict.fromkeys(
            unravel_key(key) for key in (*self.model.runner.in_keys, *self.model.beside(rows), *entries)
        )
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
    memory = Memory(model.root)
    if target is not None and not isinstance(seeder, Selection | Contrast | AtStep):
        return Asked(model, seeder, seeder, memory), rows
    parts: list[Any] = []
    for part in rows.split(chunk_size):
        with memory.kept(always=True):
            parts.append(model.tried(part))
    answers = cast(TensorDictBase, torch.cat(parts))
    outputs = answers.reshape(td.batch_size) if td.batch_dims else answers[0]
    if target is None:
        seeder = _only(outputs)
    derived = seeder.derive(outputs, td)
    _require_one(seeder(derived, td, "gradient"), seeder)
    pinned, chosen = pin(seeder, derived, td)
    for key, value in chosen.items():
        rows.set(key, value.reshape((*rows.batch_size, *value.shape[td.batch_dims :])))
    return Asked(model, seeder, pinned, memory), rows


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
