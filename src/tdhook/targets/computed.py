"""Targets that are computed from what the model writes, as a part of the model and under its rules."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeAlias, cast

from tensordict import TensorDictBase
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor

from tdhook.conventions import Convention
from tdhook.models.entries import is_batch, leaves_of
from tdhook.tape.as_one import as_one
from tdhook.targets.base import Seeder, Seeds
from tdhook.targets.outputs import Index, Selection, Target, heads_of, same_index

__all__ = ["Computed", "Derived", "as_one", "entries_of", "entry_of", "plain_keys"]

Function: TypeAlias = Callable[[TensorDictBase, TensorDictBase], Tensor]


class Derived(Selection):
    """A value that is computed from the outputs, written under ``key``, of which ``index`` is explained.

    A subclass is a dataclass that gives both and says in :meth:`value` what is computed. It is computed as a part of
    the model, so that operations have their rules, and the ledger accounts for them.

    Attributes:
        key: where the value is written, detached.
        index: which of its last axis is explained, as in :class:`~tdhook.targets.Target`.
    """

    index: Index = None

    @abstractmethod
    def value(self, outputs: TensorDictBase, inputs: TensorDictBase) -> Tensor:
        """What is explained, of shape ``[*batch]`` or ``[*batch, ...]``."""

    @property
    def reads(self) -> Sequence[NestedKey] | None:
        """Entries that are read besides those that the model writes and its inputs; ``None`` for any of them."""
        return ()

    @property
    def chosen(self) -> Target:
        """The target that explains the value, once it is there."""
        return Target(self.key, self.index)

    @property
    def source(self) -> tuple[Any, ...]:
        """What the value, and not the choice of a part of it, depends on."""
        return tuple(getattr(self, field.name) for field in fields(cast(Any, self)) if field.name != "index")

    @property
    def several(self) -> bool:
        """Whether it explains several values separately."""
        return self.chosen.several

    @property
    def writes(self) -> tuple[NestedKey, ...]:
        """Its key."""
        return (self.key,)

    @property
    def entries(self) -> list[NestedKey] | None:
        """The entries that it reads, and those that hold indices."""
        return None if self.reads is None else [*self.reads, *self.chosen.entries]

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        names = [field.name for field in fields(cast(Any, self))]
        return all(same_index(getattr(self, name), getattr(other, name)) for name in names)

    def __hash__(self) -> int:
        return hash((type(self), self.key))

    def is_of_the_value_of(self, other: Selection) -> bool:
        """Whether another target computes the same value, of which it may explain another part."""
        return isinstance(other, type(self)) and all(map(same_index, self.source, other.source))

    def derive(self, outputs: TensorDictBase, inputs: TensorDictBase) -> TensorDictBase:
        """Compute the value.

        Raises:
            TypeError: it is no floating-point tensor.
            ValueError: it does not have the batch's shape, or the model writes an entry of that name itself.
        """
        if outputs.get(self.key, None) is not None:
            raise ValueError(
                f"the module writes {self.key!r} itself, where {type(self).__name__} is to be written; give key= "
                "another name"
            )
        value: object = self.value(outputs, inputs)
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise TypeError(
                f"{self!r} computes {getattr(value, 'dtype', type(value).__name__)}; only floating-point tensors can "
                "be explained"
            )
        if value.shape[: outputs.batch_dims] != outputs.batch_size:
            raise ValueError(
                f"{self!r} computes a value of shape {tuple(value.shape)} for a batch of {list(outputs.batch_size)}; "
                "one value per batch element is needed: do not reduce over the batch"
            )
        outputs = outputs.copy()
        outputs.set(self.key, value)
        return outputs

    def weight(self, z: Tensor, outputs: TensorDictBase, inputs: TensorDictBase) -> Tensor:
        """Where the value is explained."""
        return self.chosen.weight(z, outputs, inputs)

    def __call__(self, outputs: TensorDictBase, inputs: TensorDictBase, flow: Convention) -> Seeds:
        """The seeds for this target."""
        return self.chosen(outputs, inputs, flow)


@dataclass(frozen=True, eq=False)
class Computed(Derived):
    """Whatever you compute from the outputs: ``Computed(lambda outputs, inputs: outputs["value"].square())``.

    Ordinary torch operations, which run under the rules that they have in a model; decorated with :func:`as_one` the
    function is one operation.

    Args:
        function: ``(outputs, inputs) -> Tensor``, given the entries that the model wrote and those that it was given,
            in the batch's shape; the result is of shape ``[*batch]``, or ``[*batch, n]`` to explain one or each of
            ``n`` values.
        key: where the value is written, detached.
        index: which of the last axis is explained, as in :class:`~tdhook.targets.Target`; all by default.
        entries_read: entries of the TensorDict that the function reads besides what the model reads, by default any of
            them; a compiled explanation is then made again when one of them changes its shape.

    Raises:
        TypeError: the function is not callable, or what it returns is no floating-point tensor.
        ValueError: what it returns does not have the batch's shape, or the model writes ``key`` itself.
    """

    function: Function
    key: NestedKey = "computed"
    index: Index = None
    entries_read: Sequence[NestedKey] | None = None

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise TypeError(
                f"Computed takes a function of outputs and inputs, got {type(self.function).__name__}"
            )
        plain_keys(self, "key")

    @property
    def reads(self) -> Sequence[NestedKey] | None:
        """What was said that the function reads."""
        return self.entries_read

    def value(self, outputs: TensorDictBase, inputs: TensorDictBase) -> Tensor:
        """Call the function."""
        return self.function(outputs, inputs)


def plain_keys(target: Derived, *names: str) -> None:
    """Bring the keys in the fields of these names into their plain form, and check the index."""
    for name in names:
        object.__setattr__(target, name, unravel_key(getattr(target, name)))
    _ = target.chosen  # which is made with the index


def entries_of(
    key: NestedKey, outputs: TensorDictBase, inputs: TensorDictBase, user: Seeder
) -> Tensor | TensorDictBase:
    """The entry that a target computes with, or the entries: what the module wrote, or else what it was given.

    Raises:
        KeyError: there is none.
    """
    written, given = outputs.get(key, None), inputs.get(key, None)
    if is_batch(written) or (written is None and is_batch(given)):
        # Parts of it may have been given, and others written.
        whole = (written if is_batch(written) else given).empty()
        for found in (given, written):
            for name, value in leaves_of((), found):
                whole.set(name, value)
        if not whole.is_empty():
            return whole
    return entry_of(key, outputs, inputs, user)


def entry_of(key: NestedKey, outputs: TensorDictBase, inputs: TensorDictBase, user: Seeder) -> Tensor:
    """The tensor that a target computes with: what the module wrote, or else what it was given.

    Raises:
        KeyError: there is none.
        TypeError: it is a TensorDict.
    """
    value = outputs.get(key, None)
    if value is None:
        value = inputs.get(key, None)
    if is_batch(value) and not value.is_empty():
        raise TypeError(
            f"{type(user).__name__} is computed from one tensor, and {key!r} is a TensorDict; name one of its entries: "
            f"{heads_of(key, value)}"
        )
    if not isinstance(value, Tensor):
        known = sorted({str(k) for td in (outputs, inputs) for k in td.keys(True, True)})
        raise KeyError(
            f"{type(user).__name__} is computed from {key!r}, which is not there; there are {', '.join(known)}"
        )
    return value
