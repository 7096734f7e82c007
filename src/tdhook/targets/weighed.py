"""Weighed targets: each element of the batch so many times, which tells whether elements depend on each other."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tensordict import TensorDictBase
from torch import Tensor

from tdhook.conventions import Convention
from tdhook.tape.axes import beside
from tdhook.targets.base import Around, Seeder, Seeds

__all__ = ["Weighed"]


@dataclass(frozen=True, eq=False)
class Weighed(Around):
    """A target, each element of the batch so many times.

    Args:
        target: the target.
        weights: how many, ``[*batch]``.
    """

    target: Seeder
    weights: Tensor

    def inner(self) -> Seeder:
        """The target."""
        return self.target

    def around(self, other: Seeder) -> Weighed:
        """Another target, as often."""
        return replace(self, target=other)

    def __call__(self, outputs: TensorDictBase, inputs: TensorDictBase, flow: Convention) -> Seeds:
        """Where it begins, as often."""
        seeds = self.target(outputs, inputs, flow)
        shaped = [beside(self.weights.to(z), z) for z in seeds.tensors]
        return replace(seeds, grads=[grad * x for grad, x in zip(seeds.grads, shaped, strict=True)])
