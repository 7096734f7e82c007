"""Targets in hindsight: of what a batch says was done, and not of what the model would do now."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tensordict import TensorDictBase
from tensordict.utils import NestedKey

from tdhook.conventions import Convention
from tdhook.tape.axes import beside
from tdhook.targets.base import Around, Seeder, Seeds
from tdhook.targets.pinned import is_choice

__all__ = ["InHindsight"]


@dataclass(frozen=True, eq=False)
class InHindsight(Around):
    """A target for which entries that are there stand, whatever the model would write in their place.

    Attributes:
        of: the target.
        mask: the entry that says which elements of the batch are explained, ``[*batch]``; the others are padding, whose
            relevance would flow into what stands beside it. Without the entry, all are.
    """

    of: Seeder
    mask: NestedKey

    def inner(self) -> Seeder:
        """The target."""
        return self.of

    def around(self, other: Seeder) -> InHindsight:
        """Another target, of what stands there."""
        return replace(self, of=other)

    @property
    def entries(self) -> list[NestedKey] | None:
        """Those of the target, and the mask."""
        entries = self.of.entries
        return None if entries is None else [*entries, self.mask]

    def derive(self, outputs: TensorDictBase, inputs: TensorDictBase) -> TensorDictBase:
        """Let the target compute, with what was chosen then."""
        if not self.of.writes:
            return outputs
        chosen = [key for key in self._stored(inputs) if is_choice(key, outputs, self.of)]
        computed = self.of.derive(self._instead(outputs, inputs, chosen), inputs)
        outputs = outputs.copy()
        for key in self.of.writes:
            outputs.set(key, computed.get(key))
        return outputs

    def __call__(self, outputs: TensorDictBase, inputs: TensorDictBase, flow: Convention) -> Seeds:
        """The seeds, by what is there, where the mask holds."""
        seeds = self.of(self._instead(outputs, inputs, self._stored(inputs)), inputs, flow)
        valid = inputs.get(self.mask, None)
        if valid is None:
            return seeds
        grads = [
            grad.masked_fill(~beside(valid, z), 0.0)
            for z, grad in zip(seeds.tensors, seeds.grads, strict=True)
        ]
        return replace(seeds, grads=grads)

    def _stored(self, inputs: TensorDictBase) -> list[NestedKey]:
        return [key for key in self.of.entries or () if inputs.get(key, None) is not None]

    @staticmethod
    def _instead(
        outputs: TensorDictBase, inputs: TensorDictBase, keys: Sequence[NestedKey]
    ) -> TensorDictBase:
        """The outputs, with entries of the inputs in the place of those of the same keys."""
        outputs = outputs.copy()
        for key in keys:
            outputs.set(key, inputs.get(key))
        return outputs
