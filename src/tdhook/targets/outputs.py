"""Targets that are outputs of the model: one of them, or each of several."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor

from tdhook.conventions import Convention
from tdhook.models.entries import is_batch, leaves_of
from tdhook.tape.conditions import holds, seen_to_hold
from tdhook.targets.base import Seeder, Seeds

__all__ = ["Index", "Key", "Selection", "Target", "heads_of", "output_of", "same_index", "seed_of"]


@dataclass(frozen=True)
class Key:
    """Names a TensorDict entry that holds the index of a :class:`Target`: ``Target("action_value", Key("greedy"))``."""

    key: NestedKey

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", unravel_key(self.key))


OneIndex: TypeAlias = "int | str | tuple[Any, ...] | Key | Tensor | None"
Index: TypeAlias = "OneIndex | list[Any]"


def output_of(outputs: TensorDictBase, key: NestedKey) -> Tensor:
    """What a target names.

    Raises:
        KeyError: the model did not write it.
        TypeError: it is nothing that can be explained.
    """
    value = outputs.get(key, None)
    if value is None:
        known = sorted(map(str, outputs.keys(True, True)))
        raise KeyError(f"the target names {key!r}, which the module did not write; it has {', '.join(known)}")
    if isinstance(value, Tensor) and value.is_floating_point():
        return value
    if is_batch(value):
        raise TypeError(
            f"the target {key!r} is a TensorDict; name one of its entries: {heads_of(key, value)}"
        )
    raise TypeError(
        f"the target {key!r} is {getattr(value, 'dtype', type(value).__name__)}; only floating-point outputs can be "
        "explained"
    )


def heads_of(key: NestedKey, value: object) -> str:
    """The keys of the tensors below an entry, for a message."""
    return ", ".join(repr(name) for name, _ in leaves_of(key, value)) or "there are none"


def seed_of(z: Tensor, weight: Tensor, flow: Convention) -> Tensor:
    """The seed of ``weight`` units of output ``z``: the weight, or the relevance ``weight * z``.

    Outputs of weight zero may be infinite (masked logits) and still have no relevance. A weight may be a truth value.
    """
    if flow == "gradient":
        return weight.to(z.dtype)
    if weight.dtype is torch.bool:
        return torch.where(weight, z.detach(), 0.0)
    return (weight * z.detach()).masked_fill(weight == 0, 0.0)


class Selection(Seeder):
    """A target that explains a part of one value, or several parts of it separately.

    Attributes:
        key: the key of the value.
    """

    key: NestedKey

    @property
    @abstractmethod
    def several(self) -> bool:
        """Whether it explains several values separately."""

    @abstractmethod
    def weight(self, z: Tensor, outputs: TensorDictBase, inputs: TensorDictBase) -> Tensor:
        """Where ``z`` is explained: truth values of the shape of ``z``, after a leading axis if there are several."""

    def is_of_the_value_of(self, other: Selection) -> bool:
        """Whether another target explains the same value, or another part of it."""
        return bool(self.key == other.key)


@dataclass(frozen=True, eq=False)
class Target(Selection):
    """An output of the model, or a part of it. The relevance put in is the value of what is selected.

    Args:
        key: the key of the output.
        index: which of its last axis: ``None`` for the whole output as its own relevance; ``"argmax"``; an ``int``, or
            ``ints`` for the last axes; a tensor of indices (``[*batch]`` or ``[*batch, 1]``) or one-hot (the output's
            shape); ``"action"`` for the TensorDict entry of that name, one-hot or categorical, written by the module or
            else given; any other entry as a tuple key or :class:`Key`. Several are explained at once, each separately,
            which gives relevance of shape ``[*batch, outputs, *features]``: a list of these, or ``"all"`` for each
            output (where one is masked by minus infinity it has no relevance).

    Raises:
        KeyError: the module did not write the key, or the entry of the index is missing.
        IndexError: an index is out of range.
    """

    key: NestedKey
    index: Index = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", unravel_key(self.key))
        index = self.index
        if isinstance(index, list):
            if not index:
                raise ValueError("a list of indices names at least one output, and this one is empty")
            if "all" in [one for one in index if isinstance(one, str)]:
                raise ValueError("a list names outputs one by one; for each of them, write index='all'")
            for one in index:
                _check_index(one)
            object.__setattr__(self, "index", list(index))
        elif not isinstance(index, str) or index != "all":
            _check_index(index)

    @property
    def several(self) -> bool:
        """Whether it explains several outputs separately."""
        return isinstance(self.index, list) or (isinstance(self.index, str) and self.index == "all")

    @property
    def entries(self) -> list[NestedKey]:
        """The entries of the TensorDict that hold its indices."""
        found: list[NestedKey] = []
        for index in self.index if isinstance(self.index, list) else [self.index]:
            if isinstance(index, Key):
                found.append(index.key)
            elif isinstance(index, tuple) and not all(isinstance(i, int) for i in index):
                found.append(unravel_key(index))
            elif isinstance(index, str) and index == "action":
                found.append(index)
        return found

    @property
    def explains(self) -> list[NestedKey]:
        """Its key."""
        return [self.key]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Target):
            return NotImplemented
        return self.key == other.key and same_index(self.index, other.index)

    def __hash__(self) -> int:
        return hash(self.key)

    def __call__(self, outputs: TensorDictBase, inputs: TensorDictBase, flow: Convention) -> Seeds:
        """The seeds for this target."""
        z = output_of(outputs, self.key)
        index = self.index
        if not (self.several or isinstance(index, list)):
            picked = self._picked(index, z, outputs, inputs)
            if picked is not None:
                return Seeds([self.key], [z], [_seed_at(picked, z.detach(), flow)])
        weight = self.weight(z, outputs, inputs)
        return Seeds([self.key], [z], [seed_of(z, weight, flow)], len(weight) if self.several else None)

    def weight(self, z: Tensor, outputs: TensorDictBase, inputs: TensorDictBase) -> Tensor:
        """Where ``z`` is explained: truth values of the shape of ``z``, after a leading axis if there are several."""
        index = self.index
        if isinstance(index, list):
            return torch.stack([self._one(one, z, outputs, inputs) for one in index])
        if not self.several:
            return self._one(index, z, outputs, inputs)
        event = z.shape[outputs.batch_dims :]
        count = event.numel()
        eye = torch.eye(count, dtype=torch.bool, device=z.device)
        return eye.reshape(count, *(1,) * outputs.batch_dims, *event) & (z.detach() != -torch.inf)

    def _one(self, index: OneIndex, z: Tensor, outputs: TensorDictBase, inputs: TensorDictBase) -> Tensor:
        picked = self._picked(index, z, outputs, inputs)
        if picked is not None:
            return torch.zeros_like(z, dtype=torch.bool).scatter_(-1, picked, True)
        if index is None:
            return torch.ones_like(z, dtype=torch.bool)
        return self._at(z, (index,) if isinstance(index, int) else cast("tuple[int, ...]", index))

    def _picked(
        self, index: OneIndex, z: Tensor, outputs: TensorDictBase, inputs: TensorDictBase
    ) -> Tensor | None:
        """Which of the last axis each element of the batch picks, ``[*batch, 1]``; ``None`` where all pick the same."""
        if index is None:
            return None
        if z.dim() == 0 or (z.dim() == outputs.batch_dims and outputs.batch_dims):
            raise IndexError(
                f"the target {self.key!r} of shape {tuple(z.shape)} has one value per batch element; use index=None"
            )
        if isinstance(index, int) or (isinstance(index, tuple) and all(isinstance(i, int) for i in index)):
            return None
        if isinstance(index, Tensor):
            return self._from_tensor(index, z, "the index")
        if index == "argmax":
            return z.detach().argmax(-1, keepdim=True)
        key = index.key if isinstance(index, Key) else unravel_key(index)
        entry = outputs.get(key, None)
        if entry is None:
            entry = inputs.get(key, None)
        if entry is None:
            known = sorted({str(k) for td in (outputs, inputs) for k in td.keys(True, True)})
            raise KeyError(
                f"the target takes its index from {key!r}, which is not there; there are {', '.join(known)}"
            )
        if is_batch(entry):
            raise ValueError(
                f"entry {key!r} is a TensorDict, and the index of {self.key!r} is one tensor; name one of its entries, "
                f"index=Key(...): {heads_of(key, entry)}"
            )
        if not isinstance(entry, Tensor):
            raise TypeError(
                f"entry {key!r} is no tensor but {type(entry).__name__}, and no index of {self.key!r}"
            )
        return self._from_tensor(entry, z, f"entry {key!r}")

    def _at(self, z: Tensor, index: tuple[int, ...]) -> Tensor:
        for axis, i in enumerate(index, start=-len(index)):
            if len(index) > z.dim() or not -z.shape[axis] <= i < z.shape[axis]:
                size = "no such axis" if len(index) > z.dim() else f"{z.shape[axis]} outputs"
                raise IndexError(
                    f"target index {i} is out of range for {self.key!r}, which has {size} (shape {tuple(z.shape)})"
                )
        weight = torch.zeros_like(z, dtype=torch.bool)
        where: tuple[Any, ...] = (..., *index)
        weight[where] = True
        return weight

    def _from_tensor(self, entry: Tensor, z: Tensor, what: str) -> Tensor:
        entry = entry.to(z.device)
        if entry.shape == z.shape and z.shape[-1] > 1:
            hot = entry != 0
            if entry.is_floating_point() and not holds((entry == 0) | (entry == 1)):
                raise TypeError(
                    f"{what} is continuous: it picks no output of {self.key!r}; use index=None to explain all of it"
                )
            one, first = hot.sum(-1) == 1, hot.to(torch.uint8).argmax(-1, keepdim=True)
            # torchrl's greedy actions name all of several outputs that are equal, and the first is taken.
            if not seen_to_hold(one) and not holds(one | _tied(hot, first, z.detach())):
                raise ValueError(
                    f"{what} has the shape of {self.key!r} but is not one-hot along the last axis; where it names "
                    "several outputs, explain their sum with Computed, or give index= for one of them"
                )
            return first
        if entry.is_floating_point():
            raise TypeError(
                f"{what} of dtype {entry.dtype} and shape {tuple(entry.shape)} is no index of {self.key!r}"
            )
        entry = entry.long()  # small and unsigned integers hold no negative count of outputs
        if entry.shape == (*z.shape[:-1], 1):
            entry = entry.squeeze(-1)
        try:
            entry = entry.expand(z.shape[:-1])
        except RuntimeError:
            raise ValueError(
                f"{what} of shape {tuple(entry.shape)} is neither one index per batch element nor one-hot for "
                f"{self.key!r} of shape {tuple(z.shape)}; where it holds several actions, explain the sum of what they "
                "are worth with Computed, or give index= for one of them"
            ) from None
        count = z.shape[-1]
        inside = (entry >= -count) & (entry < count)
        if not holds(inside):
            raise IndexError(
                f"target index {int(entry[~inside][0])} from {what} is out of range for {self.key!r}, which has "
                f"{count} outputs (shape {tuple(z.shape)})"
            )
        return (entry % count).unsqueeze(-1)


def _tied(hot: Tensor, first: Tensor, z: Tensor) -> Tensor:
    """Where an entry names several outputs, all of the value of the first of them."""
    return (hot.sum(-1) > 1) & (~hot | (z == z.gather(-1, first))).all(-1)


def _seed_at(picked: Tensor, z: Tensor, flow: Convention) -> Tensor:
    """The seed of one of the last axis for each element: one, or its value in the relevance convention."""
    if flow == "gradient":
        return torch.zeros_like(z).scatter_(-1, picked, 1.0)
    return torch.zeros_like(z).scatter_(-1, picked, z.gather(-1, picked))


def _check_index(index: object) -> None:
    if isinstance(index, str) and index not in ("argmax", "action"):
        raise ValueError(
            f"index={index!r} is none of 'argmax', 'action', 'all'; to take the index from a TensorDict entry, "
            f"write Key({index!r})"
        )
    if isinstance(index, bool) or not isinstance(index, int | str | tuple | Key | Tensor | None):
        raise TypeError(
            f"index is None, an int, a string, a key or a tensor, or a list of these; got {type(index).__name__}"
        )


def same_index(a: object, b: object) -> bool:
    """Whether two indices, or other arguments, are equal, tensors by their values."""
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same_index, a, b))
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b)
    return bool(a == b)
