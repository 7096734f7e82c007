"""What was found of the units of a layer: their lists of steps, and how much each matters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from tensordict import TensorDict
from torch import Tensor

from tdhook.datasets.top_lists import note_key
from tdhook.keys import under

__all__ = ["Found"]


@dataclass(frozen=True)
class Found:
    """The units of a layer, as a :class:`~tdhook.datasets.UnitRows` tells of them: here, or as a result of a job.

    Attributes:
        told: by name, as described there.
    """

    told: Mapping[str, Tensor]

    @property
    def groups(self) -> list[int]:
        """The groups that there are."""
        groups: list[int] = self.told["group"].tolist()
        return groups

    @property
    def count(self) -> Tensor:
        """How many steps were counted of each group, ``[groups]``."""
        return self.told["count"]

    @property
    def units(self) -> int:
        """How many units there are."""
        return int(self.told["mean"].shape[1])

    @property
    def places(self) -> tuple[int, ...]:
        """The shape of the places of a unit, which positions count."""
        return tuple(self.told["places"].tolist())

    def mean(self, group: int | None = None) -> Tensor:
        """How much each unit matters on average, ``[units]``, in a group, or in all steps."""
        return self._mean("mean", group)

    def absolute(self, group: int | None = None) -> Tensor:
        """The mean size of what each unit is worth, ``[units]``, in a group, or in all steps."""
        return self._mean("absolute", group)

    def ranked(self, group: int | None = None) -> Tensor:
        """The units, ``[units]``, that which matters most on average first."""
        return torch.argsort(self.mean(group), descending=True, stable=True)

    def best(
        self,
        unit: int,
        group: int | None = None,
        *,
        against: bool = False,
        count: int | None = None,
        apart: int = 1,
    ) -> TensorDict:
        """The steps in which a unit mattered most.

        Args:
            unit: its number.
            group: in which group; by default in any.
            against: whether those in which it spoke most against what is explained.
            count: how many; by default all that are listed.
            apart: how many rows are between any two of them, at the least: in an episode, the steps right after the
                best one are nearly as good, and much like it.

        Returns:
            ``row``, ``step``, ``group``, ``amount``, ``position``, ``place`` (the position along each axis of places)
            and notes, by their keys under ``"note"``, ``[found]``, the first the most.

        Raises:
            IndexError: there is no such unit.
            ValueError: there is no such group, or what spoke against was not listed.
        """
        if not -self.units <= unit < self.units:
            raise IndexError(f"there is no unit {unit}: the layer has {self.units}")
        listed = self.told["row"]
        if against and listed.shape[1] < 2:
            raise ValueError("steps against were not listed: make the samples with against=True")
        where = slice(None) if group is None else self._place(group)
        names = [name for name, value in self.told.items() if value.shape == listed.shape]
        lists = {name: self.told[name][where, int(against), unit].reshape(-1) for name in names}
        among = self.told["group"][where].reshape(-1, 1).expand(-1, listed.shape[-1]).reshape(-1)
        lists["group"] = among
        there = lists["row"] >= 0
        lists = {name: value[there] for name, value in lists.items()}
        order = torch.argsort(lists["step"], stable=True)
        order = order[torch.argsort(lists["row"][order], stable=True)]
        order = order[torch.argsort(lists["amount"][order], descending=not against, stable=True)]
        # Where a list has left steps out, one that no list has may come behind these.
        if bool((self.count[where] > listed.shape[-1]).any()):
            order = order[: listed.shape[-1]]
        order = order[_apart(lists["row"][order], apart)][: len(order) if count is None else count]
        found = TensorDict({}, [len(order)])
        for name, value in lists.items():
            noted = note_key(name)
            found.set(name if noted is None else under("note", noted), value[order])
        found.set("place", self.place(found.get("position")))
        return found

    def place(self, position: Tensor) -> Tensor:
        """Positions ``[...]`` as places along each axis, ``[..., axes]``."""
        shape, axes = self.places, []
        for i in range(len(shape)):
            axes.append(position // math.prod(shape[i + 1 :]) % shape[i])
        return torch.stack(axes, -1) if axes else position.new_zeros(*position.shape, 0)

    def _mean(self, name: str, group: int | None) -> Tensor:
        if group is not None:
            return self.told[name][self._place(group)]
        weight = self.count.double() / self.count.sum()
        return (self.told[name] * weight.unsqueeze(-1)).sum(0)

    def _place(self, group: int) -> int:
        if group not in self.groups:
            raise ValueError(f"there is no group {group}: there are {', '.join(map(str, self.groups))}")
        return self.groups.index(group)


def _apart(rows: Tensor, least: int) -> Tensor:
    """Of rows ``[rows]``, the best first, the places of those that are so far from all better ones that are kept."""
    kept = torch.zeros(0, dtype=torch.int64)
    for i in range(len(rows)) if least > 1 else ():
        if bool(((rows[kept] - rows[i]).abs() >= least).all()):
            kept = torch.cat([kept, torch.tensor([i])])
    return kept if least > 1 else torch.arange(len(rows))
