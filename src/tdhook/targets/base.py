"""What every target is: a value that gives the seeds of the backward pass."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook.conventions import Convention

__all__ = ["Around", "Seeder", "Seeds", "require_dependence"]


@dataclass
class Seeds:
    """Where the backward pass starts.

    Attributes:
        keys: names of the explained tensors, for error messages.
        tensors: the explained tensors, on the graph.
        grads: what flows into each, in the convention of the flow, of the shape of the tensor; with ``several`` there
            is one more leading axis.
        several: how many explanations are asked for at once, ``None`` for a single one.
        whole: what all was asked for, where it starts from a part of that.
        handed: places beside the values on the graph, with what is handed over there, of the shape of the place: by
            functions to the layers before them, where the backward pass starts in between.
    """

    keys: list[NestedKey]
    tensors: list[Tensor]
    grads: list[Tensor]
    several: int | None = None
    whole: Seeds | None = None
    handed: Sequence[tuple[Tensor, Tensor]] = ()


class Seeder(ABC):
    """What is explained. A subclass of your own is a target like those that are here."""

    @property
    def entries(self) -> Sequence[NestedKey] | None:
        """Entries of the TensorDict that it reads besides what the model reads; ``None`` for any of them."""
        return ()

    @property
    def in_keys(self) -> Sequence[NestedKey]:
        """Of those entries, the ones without which nothing is explained: the explained module reads them."""
        return ()

    @property
    def explains(self) -> Sequence[NestedKey] | None:
        """Keys of the outputs that it starts from, or computes with; ``None`` for any of them.

        What the model computes behind these is not needed for the backward pass.
        """
        return None

    @property
    def choices(self) -> Sequence[NestedKey]:
        """Entries that hold what a policy chose, whatever they are called, and that stay when inputs are changed."""
        return ()

    @property
    def writes(self) -> Sequence[NestedKey]:
        """Keys of what it computes and writes besides what the model writes."""
        return ()

    @property
    def places(self) -> Sequence[Any]:
        """Where inside the model relevance has to pass, in the order in which it does (:data:`~through.Place`)."""
        return ()

    @property
    def tells(self) -> Sequence[NestedKey]:
        """Keys of what it finds out of what it explains, and is written too."""
        return ()

    def derive(self, outputs: TensorDictBase, inputs: TensorDictBase) -> TensorDictBase:
        """The outputs, and what is computed from them to be explained.

        Called as a part of the model: what is computed here has rules, as any operation has.
        """
        return outputs

    @abstractmethod
    def __call__(self, outputs: TensorDictBase, inputs: TensorDictBase, flow: Convention) -> Seeds:
        """The seeds, given what the model wrote and what it was given."""


class Around(Seeder):
    """A target that says something else of another one, and reads, computes and writes what that one does."""

    @abstractmethod
    def inner(self) -> Seeder:
        """The other one."""

    def around(self, other: Seeder) -> Seeder | None:
        """The same said of another one; ``None`` where it holds for its own alone."""
        return None

    @property
    def entries(self) -> Sequence[NestedKey] | None:
        return self.inner().entries

    @property
    def in_keys(self) -> Sequence[NestedKey]:
        return self.inner().in_keys

    @property
    def explains(self) -> Sequence[NestedKey] | None:
        return self.inner().explains

    @property
    def choices(self) -> Sequence[NestedKey]:
        return self.inner().choices

    @property
    def writes(self) -> Sequence[NestedKey]:
        return self.inner().writes

    @property
    def places(self) -> Sequence[Any]:
        return self.inner().places

    @property
    def tells(self) -> Sequence[NestedKey]:
        return self.inner().tells

    def derive(self, outputs: TensorDictBase, inputs: TensorDictBase) -> TensorDictBase:
        return self.inner().derive(outputs, inputs)


def require_dependence(
    seeds: Seeds, sources: Iterable[NestedKey], depends: Sequence[bool], passing: str | None = None
) -> None:
    """Raise for the first of the targets that depends on nothing that is attributed.

    Args:
        seeds: the targets.
        sources: keys of what is attributed, for the message.
        depends: for each target whether it does, or one value for all of them.
        passing: the layer that it has to depend on, in words, where that is meant and not what is attributed.
    """
    if not all(depends):
        target = repr(seeds.keys[depends.index(False)])
        if passing is not None:
            raise ValueError(
                f"the target {target} does not depend on {passing}, so that none of its relevance passes there"
            )
        raise ValueError(
            f"the target {target} does not depend on any attributed input ({', '.join(map(repr, sources))})"
        )
