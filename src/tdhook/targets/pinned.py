"""Pinned targets: what was chosen of the inputs as they were is explained, whatever becomes of the inputs."""

from __future__ import annotations

from dataclasses import dataclass

from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook.conventions import Convention, relevance_of
from tdhook.keys import ASKED, parts_of
from tdhook.targets.base import Around, Seeder, Seeds

__all__ = ["Pinned", "pin"]


@dataclass(frozen=True, eq=False)
class Pinned(Around):
    """A target that has chosen: it explains what it explained of the inputs as they were, whatever they are now.

    Attributes:
        of: the target.
        keys: what it explains; with what weights is an entry of the inputs.
        kept: entries, chosen by the model, that it computes with; their values are entries of the inputs.
        several: how many it explains separately, ``None`` for a single one.
    """

    of: Seeder
    keys: tuple[NestedKey, ...]
    kept: tuple[NestedKey, ...]
    several: int | None = None

    def inner(self) -> Seeder:
        """The target."""
        return self.of

    @property
    def entries(self) -> list[NestedKey] | None:
        """Those of the target, and what was kept."""
        entries = self.of.entries
        return None if entries is None else [*entries, *map(_weight, range(len(self.keys))), *self._chosen]

    @property
    def _chosen(self) -> list[NestedKey]:
        return [_entry(i) for i in range(len(self.kept))]

    def derive(self, outputs: TensorDictBase, inputs: TensorDictBase) -> TensorDictBase:
        """Let the target compute, with the entries as they were."""
        if not self.of.writes:
            return outputs
        before = outputs.copy()
        for key, entry in zip(self.kept, self._chosen, strict=True):
            before.set(key, inputs.get(entry))
        derived = outputs.copy()
        computed = self.of.derive(before, inputs)
        for key in self.of.writes:
            derived.set(key, computed.get(key))
        return derived

    def __call__(self, outputs: TensorDictBase, inputs: TensorDictBase, flow: Convention) -> Seeds:
        """The seeds, with the weights as they were."""
        tensors = [outputs.get(key) for key in self.keys]
        weights = [inputs.get(_weight(i)).to(z) for i, z in enumerate(tensors)]
        if self.several is not None:
            weights = [weight.movedim(outputs.batch_dims, 0) for weight in weights]
        if flow == "relevance":
            # An output of weight zero may be infinite (masked logits).
            weights = [relevance_of(z, w, "gradient") for w, z in zip(weights, tensors, strict=True)]
        return Seeds(list(self.keys), tensors, weights, self.several)


def pin(
    target: Seeder, outputs: TensorDictBase, inputs: TensorDictBase
) -> tuple[Pinned, dict[NestedKey, Tensor]]:
    """Let a target choose.

    Args:
        target: the target.
        outputs: what the model wrote, and what the target computes of it.
        inputs: what the model was given.

    Returns:
        The target that has chosen, and the entries ``[*batch, ...]`` to give with inputs from now on.
    """
    seeds = target(outputs, inputs, "gradient")
    found: dict[NestedKey, Tensor] = {}
    for i, weight in enumerate(seeds.grads):
        found[_weight(i)] = weight if seeds.several is None else weight.movedim(0, outputs.batch_dims)
    kept = [key for key in target.entries or () if is_choice(key, outputs, target)]
    for i, key in enumerate(kept):
        found[_entry(i)] = outputs.get(key)
    return Pinned(target, tuple(seeds.keys), tuple(kept), seeds.several), found


def is_choice(key: NestedKey, outputs: TensorDictBase, target: Seeder) -> bool:
    """Whether an entry that a target reads is what the model chose, and not a value that it computed."""
    value = outputs.get(key, None)
    if value is None:
        return False
    if "action" in parts_of(key) or key in target.choices:
        return True
    return isinstance(value, Tensor) and not value.is_floating_point()


def _weight(i: int) -> NestedKey:
    return (ASKED, f"weight {i}")


def _entry(i: int) -> NestedKey:
    return (ASKED, f"entry {i}")
