"""Units: the parts of a layer that are told apart, along one of its axes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook.tape.conditions import holds
from tdhook.targets.outputs import Key

if TYPE_CHECKING:
    from typing import TypeGuard

__all__ = [
    "ALL",
    "NONE",
    "Chosen",
    "Layer",
    "Units",
    "UnitsLike",
    "equal_heads",
    "feature_axis",
    "top_count",
]

UnitsLike: TypeAlias = "int | tuple[int | str, ...] | list[int | tuple[int, ...]] | str | Key | Tensor"
"""Which units: an ``int``; a tuple of them, together; a list of these, each separately; ``"all"``, each; ``"top:8"``,
each of those that matter most; an entry with their numbers, as a :class:`Key` or a tuple key; or a tensor."""

ALL, NONE, _TOP = "all", "none", "top:"


@dataclass(frozen=True)
class Layer:
    """A value inside a model, as it lies there.

    Attributes:
        name: what it is called, for messages.
        value: ``[*lead, *features]``.
        lead: how many leading axes are those of the batch: all of them, or one where the model runs on a flat batch.
        batch: the batch size; of a layer that does not begin with the batch, the size of its first axis.
        folded: whether it does not: its first axis is that of tokens of all elements, say, or of those that an expert
            was given.
    """

    name: str
    value: Tensor
    lead: int
    batch: torch.Size
    folded: bool = False

    @property
    def features(self) -> list[int]:
        """The shape of what belongs to one element of the batch."""
        return list(self.value.shape[self.lead :])


@dataclass(frozen=True)
class Chosen:
    """Units that were chosen.

    Attributes:
        marks: ``[*batch, units]``, truth values, or ``[several, *batch, units]``.
        several: how many there are, each of which is explained separately; ``None`` for one, or some together.
        numbers: which these are, ``[*batch, several]``, where it was not said beforehand.
    """

    marks: Tensor
    several: int | None = None
    numbers: Tensor | None = None


@dataclass(frozen=True)
class Units:
    """The units of a layer: along which axis they lie, and how many values of it belong to one.

    Args:
        axis: of the layer, in which the batch counts as one axis, the first; negative ones from the end. By default
            the only axis that there is besides.
        heads: the axis consists of so many equal parts, each of which is a unit; by default each of its values is one.
    """

    axis: int | None = None
    heads: int | None = None

    def along(self, layer: Layer) -> int:
        """The axis of the layer's value, ``layer.lead`` or more.

        Raises:
            ValueError: it has several axes, and none is named; or it has none.
            IndexError: it has no such axis.
        """
        count, axis = len(layer.features), self.axis
        if count == 0:
            raise ValueError(f"{layer.name} has one value for each element of the batch, and no units")
        if axis is None:
            if count > 1:
                raise ValueError(
                    f"{layer.name} has the axes {['batch', *layer.features]}: say along which its units lie, axis=1 to "
                    f"{count}, or negative from the end"
                )
            return layer.lead
        return layer.lead + feature_axis(axis, layer.features, "units", layer.name)

    def count(self, layer: Layer) -> int:
        """How many units there are.

        Raises:
            ValueError: the axis is no multiple of the heads.
        """
        size = layer.value.shape[self.along(layer)]
        return size if self.heads is None else equal_heads(self.heads, size, layer.name)

    def pooled(self, amounts: Tensor, layer: Layer) -> Tensor:
        """The sum of what belongs to each unit, ``[..., *batch, units]``.

        Args:
            amounts: of the shape of the layer, or with axes before it.
            layer: the layer.
        """
        before = amounts.dim() - layer.value.dim()
        moved = amounts.movedim(before + self.along(layer), before + layer.lead)
        lead = moved.shape[: before + layer.lead]
        return moved.reshape(*lead[:before], *layer.batch, self.count(layer), -1).sum(-1)

    def spread(self, marks: Tensor, layer: Layer) -> Tensor:
        """Marks ``[..., *batch, units]`` so that they lie beside the layer's value, ``[..., *lead, *ones]``."""
        before = marks.dim() - 1 - len(layer.batch)
        axis, size = self.along(layer), layer.value.shape[self.along(layer)]
        marks = marks.repeat_interleave(size // self.count(layer), -1) if self.heads is not None else marks
        ones = [size if i == axis else 1 for i in range(layer.lead, layer.value.dim())]
        return marks.reshape((*marks.shape[:before], *layer.value.shape[: layer.lead], *ones))

    def choose(
        self, units: UnitsLike, layer: Layer, amounts: Tensor, outputs: TensorDictBase, inputs: TensorDictBase
    ) -> Chosen:
        """The units that are meant.

        Args:
            units: which.
            layer: the layer.
            amounts: how much each matters, ``[*batch, units]``.
            outputs: what the model wrote, which may hold their numbers.
            inputs: what it was given, which may hold them.

        Raises:
            IndexError: there is no such unit.
            KeyError: the entry is missing.
            ValueError: a tensor or an entry has another shape than numbers of units, or marks of them, have.
        """
        count, batch, device = self.count(layer), layer.batch, layer.value.device
        if layer.folded and (
            top_count(units) is not None or isinstance(units, Key | Tensor) or _is_key(units)
        ):
            raise ValueError(
                f"{layer.name} has the shape {list(layer.value.shape)}, which does not begin with the batch, so that "
                "units are the same for all elements: name them by numbers, or 'all'"
            )
        if isinstance(units, str):
            if units == NONE:
                return Chosen(torch.zeros(*batch, count, dtype=torch.bool, device=device))
            top = top_count(units)
            if top is None:
                marks = torch.eye(count, dtype=torch.bool, device=device)
                return Chosen(_for_all(marks, batch), count)
            if top > count:
                raise IndexError(f"{units!r} are more than the {count} units of {layer.name}")
            numbers = amounts.abs().topk(top, -1).indices
            return _numbered(numbers, count, layer)
        if isinstance(units, Key) or _is_key(units):
            key: NestedKey = units.key if isinstance(units, Key) else units
            return self._of_entry(key, layer, outputs, inputs)
        if isinstance(units, Tensor):
            return self._of_tensor(units.to(device), layer, "the tensor of units")
        groups = units if isinstance(units, list) else [units]
        marks = torch.zeros(len(groups), count, dtype=torch.bool, device=device)
        for row, group in zip(marks, groups, strict=True):
            for number in group if isinstance(group, tuple) else (group,):
                assert isinstance(number, int)
                if not -count <= number < count:
                    raise IndexError(f"unit {number} is out of range: {layer.name} has {count} units")
                row[number] = True
        if isinstance(units, list):
            return Chosen(_for_all(marks, batch), len(groups))
        return Chosen(marks[0].expand(*batch, count))

    def _of_entry(
        self, key: NestedKey, layer: Layer, outputs: TensorDictBase, inputs: TensorDictBase
    ) -> Chosen:
        entry = outputs.get(key, None)
        entry = inputs.get(key, None) if entry is None else entry
        if entry is None:
            known = sorted({str(k) for td in (outputs, inputs) for k in td.keys(True, True)})
            raise KeyError(f"entry {key!r}, which names units, is not there; there are {', '.join(known)}")
        return self._of_tensor(entry.to(layer.value.device), layer, f"entry {key!r}")

    def _of_tensor(self, entry: Tensor, layer: Layer, what: str) -> Chosen:
        count, batch = self.count(layer), layer.batch
        if entry.is_floating_point():
            raise TypeError(f"{what} of dtype {entry.dtype} names no units of {layer.name}")
        if entry.dtype is torch.bool:
            if entry.shape not in ((count,), (*batch, count)):
                raise ValueError(
                    f"{what} marks units by truth values, {[count]} or {[*batch, count]}, and has the shape "
                    f"{list(entry.shape)}"
                )
            return Chosen(entry.expand(*batch, count))
        entry = entry.long()  # which has room for -count
        if not holds((entry >= -count) & (entry < count)):
            wrong = entry[(entry < -count) | (entry >= count)][0]
            raise IndexError(f"unit {int(wrong)} of {what} is out of range: {layer.name} has {count} units")
        if entry.shape == batch:
            hot = (entry % count).unsqueeze(-1)
            return Chosen(
                torch.zeros(*batch, count, dtype=torch.bool, device=entry.device).scatter_(-1, hot, True)
            )
        if (entry.dim() == 1 and not batch) or entry.shape[:-1] == batch:
            return _numbered(entry % count, count, layer)
        raise ValueError(
            f"{what} of shape {list(entry.shape)} names units of {layer.name} neither one nor several for each element "
            f"of the batch {list(batch)}"
        )


def feature_axis(axis: int, features: Sequence[int], what: str, name: str) -> int:
    """An axis among those of the features, where it is counted with the batch as one before them, or from the end.

    Args:
        axis: which.
        features: the shape of a layer without the batch.
        what: lies along it, for the message.
        name: of the layer, for the message.

    Raises:
        IndexError: there is none.
    """
    count = len(features)
    if axis == 0 or not -count <= axis <= count:
        raise IndexError(
            f"axis={axis} is no axis of {what} of {name}, which has {['batch', *features]}: they lie along one of 1 to "
            f"{count}, or of -{count} to -1"
        )
    return axis - 1 if axis > 0 else count + axis


def equal_heads(heads: int, size: int, name: str) -> int:
    """So many heads.

    Raises:
        ValueError: an axis of that size does not consist of so many equal parts.
    """
    if heads < 1 or size % heads:
        raise ValueError(f"the axis of {size} of {name} does not consist of {heads} equal heads")
    return heads


def _is_key(units: object) -> TypeGuard[tuple[str, ...]]:
    return isinstance(units, tuple) and isinstance(units[0], str)


def top_count(units: object) -> int | None:
    """How many are meant by ``"top:8"``; ``None`` for anything else."""
    if not isinstance(units, str) or not units.startswith(_TOP):
        return None
    return int(units.removeprefix(_TOP))


def _for_all(marks: Tensor, batch: torch.Size) -> Tensor:
    """Marks ``[several, units]`` for each element, ``[several, *batch, units]``."""
    return marks.reshape(len(marks), *(1,) * len(batch), -1).expand(len(marks), *batch, marks.shape[-1])


def _numbered(numbers: Tensor, count: int, layer: Layer) -> Chosen:
    """Units by their numbers, ``[*batch, several]``."""
    hot = torch.zeros(*numbers.shape, count, dtype=torch.bool, device=numbers.device)
    hot = hot.scatter_(-1, numbers.unsqueeze(-1), True)
    return Chosen(hot.movedim(len(layer.batch), 0), numbers.shape[-1], numbers)
