"""Contrasts: why this and not that, and what else stands for a target."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook.conventions import Convention, per_value
from tdhook.targets.base import Seeder, Seeds
from tdhook.targets.outputs import Selection, Target, output_of, seed_of

__all__ = ["Contrast", "TargetLike", "as_seeder"]


@dataclass(frozen=True)
class Contrast(Seeder):
    """Why this and not that: the relevance of ``a`` minus that of ``b``.

    Where one of them explains several outputs, the other is compared with each of these, which gives relevance of shape
    ``[*batch, outputs, *features]``: ``Contrast(Target("q", "argmax"), Target("q", "all"))`` is the best against each.

    Args:
        a: the output that is explained, or what is computed (:mod:`tdhook.targets.computed`).
        b: the one that it is compared with.
    """

    a: Selection
    b: Selection

    def __post_init__(self) -> None:
        targets: tuple[object, ...] = (self.a, self.b)
        for target in targets:
            if not isinstance(target, Selection):
                raise TypeError(f"Contrast compares two targets, got {target!r}")
        if self.a.several and self.b.several:
            raise TypeError(
                f"Contrast compares one output with one or with several, got several twice: {self.a!r} and {self.b!r}"
            )
        alike = self.a.is_of_the_value_of(self.b) and self.b.is_of_the_value_of(self.a)
        if self.a.key == self.b.key and not alike:
            raise ValueError(
                f"{self.a!r} and {self.b!r} are different values of the same name; give one of them another key="
            )

    @property
    def entries(self) -> list[NestedKey] | None:
        """The entries of the TensorDict that hold indices, and others that are read."""
        found: list[NestedKey] = []
        for entries in (self.a.entries, self.b.entries):
            if entries is None:
                return None
            found += entries
        return found

    @property
    def explains(self) -> list[NestedKey] | None:
        """What is compared, and what that is computed from."""
        a, b = self.a.explains, self.b.explains
        return None if a is None or b is None else [*a, *b]

    @property
    def choices(self) -> list[NestedKey]:
        """What was chosen, for either."""
        return [*self.a.choices, *self.b.choices]

    @property
    def writes(self) -> Sequence[NestedKey]:
        """The keys of what is computed."""
        return list(dict.fromkeys([*self.a.writes, *self.b.writes]))

    def derive(self, outputs: TensorDictBase, inputs: TensorDictBase) -> TensorDictBase:
        """Compute what is compared."""
        outputs = self.a.derive(outputs, inputs)
        return outputs if self.a.key == self.b.key else self.b.derive(outputs, inputs)

    def __call__(self, outputs: TensorDictBase, inputs: TensorDictBase, flow: Convention) -> Seeds:
        """The seeds for this contrast."""
        several: int | None = None
        weights: dict[NestedKey, Tensor] = {}
        for target, sign in ((self.a, 1.0), (self.b, -1.0)):
            z = output_of(outputs, target.key)
            weight = target.weight(z, outputs, inputs).to(z.dtype)
            if target.several:
                several = len(weight)
            weight = sign * weight
            weights[target.key] = weights[target.key] + weight if target.key in weights else weight
        tensors = [output_of(outputs, key) for key in weights]
        grads = [seed_of(z, weight, flow) for z, weight in zip(tensors, weights.values(), strict=True)]
        if several is not None:
            grads = [grad.expand(several, *z.shape) for grad, z in zip(grads, tensors, strict=True)]
        return Seeds(list(weights), tensors, grads, several)


TargetFn: TypeAlias = Callable[[TensorDictBase, TensorDictBase], TensorDictBase]
TargetLike: TypeAlias = "Seeder | str | tuple[str, ...] | TargetFn | None"


def as_seeder(target: TargetLike) -> Seeder:
    """What makes the seeds of a target: a key stands for all of that output, ``None`` for the only one there is."""
    if target is None:
        return _OnlyOutput()
    if isinstance(target, Seeder):
        return target
    if isinstance(target, str | tuple):
        return Target(target)
    if callable(target):
        return _Computed(target)
    raise TypeError(f"a target is a Target, a Contrast, a key or a callable, got {type(target).__name__}")


class _OnlyOutput(Seeder):
    """The one output that depends on the inputs."""

    def __call__(self, outputs: TensorDictBase, inputs: TensorDictBase, flow: Convention) -> Seeds:
        tensors = {key: z for key, z in outputs.items(True, True) if isinstance(z, Tensor)}
        keys = [key for key, z in tensors.items() if z.is_floating_point() and z.requires_grad]
        if len(keys) != 1:
            found = ", ".join(repr(key) for key in keys) or "none that depends on an attributed input"
            raise ValueError(
                f"which output is to be explained? Give target=Target(key); the module wrote {found}"
            )
        return Target(keys[0])(outputs, inputs, flow)


@dataclass(frozen=True)
class _Computed(Seeder):
    """A user's ``(outputs, inputs) -> relevance`` as a target."""

    function: TargetFn

    @property
    def entries(self) -> None:
        """What the function reads is not known."""
        return None

    def __call__(self, outputs: TensorDictBase, inputs: TensorDictBase, flow: Convention) -> Seeds:
        relevance = self.function(outputs, inputs)
        if not isinstance(relevance, TensorDictBase):
            raise TypeError(
                f"a target function returns a TensorDict of relevance, got {type(relevance).__name__}"
            )
        keys: list[NestedKey] = list(relevance.keys(True, True))
        tensors = [output_of(outputs, key) for key in keys]
        grads = []
        for key, z in zip(keys, tensors, strict=True):
            r = relevance.get(key).detach()
            if r.shape != z.shape:
                raise ValueError(
                    f"the target function gave relevance of shape {tuple(r.shape)} for {key!r}, whose shape is "
                    f"{tuple(z.shape)}"
                )
            if flow == "gradient":
                r = per_value(z, r)
            grads.append(r)
        return Seeds(keys, tensors, grads)
