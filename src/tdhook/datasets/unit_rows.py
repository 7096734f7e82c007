"""Rows of units: the steps in which each unit of a layer mattered most, and how much it matters in each group."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor

from tdhook.contexts.recorded import padding_told
from tdhook.datasets.exact import DIGITS, carried, digits_of, value_of
from tdhook.datasets.reducing import By, Part, Piece, Reducer, aligned, groups_of, labels_of
from tdhook.datasets.top_lists import best, both, note_name
from tdhook.keys import known_keys, parts_of
from tdhook.models.capture import call_name
from tdhook.targets.units import Layer, Units

__all__ = ["NOTED", "UnitRows", "by_units"]

NOTED: tuple[NestedKey, ...] = (
    "step_count",
    ("collector", "traj_ids"),
    "episode_reward",
    ("next", "reward"),
    ("next", "episode_reward"),
)
"""What is noted of each step, where the data have it."""


def by_units(
    value: Tensor, axis: int | None, heads: int | None, layer: NestedKey
) -> tuple[Tensor, tuple[int, ...]]:
    """A layer by its units, ``[steps, units, places]``, and the shape of the places: its other axes.

    Args:
        value: ``[steps, *features]``.
        axis: that of the units, counted with that of the steps: ``1`` is the first of the features. By default the only
            one.
        heads: how many equal parts side by side the axis has, each of which is a unit; by default each entry is one.
        layer: its name, for the message.

    Raises:
        IndexError: there is no such axis.
        ValueError: there are several and none is named, or it does not have such heads.
    """
    units, lying = Units(axis, heads), Layer(repr(layer), value, 1, value.shape[:1])
    place, count = units.along(lying), units.count(lying)
    if heads is not None:
        value = value.unflatten(place, (count, -1))
    moved = value.movedim(place, 1)
    return moved.reshape(*moved.shape[:2], moved.shape[2:].numel()), tuple(moved.shape[2:])


@dataclass(frozen=True)
class _Steps:
    """Steps of a piece in their order, without those that are padding.

    Attributes:
        row: the number of the row of each.
        step: its place in its row, zero where a row is one step.
        group: the group of each.
        notes: what else is known of each, by name.
        value: what is looked at, ``[steps, *features]``.
    """

    row: Tensor
    step: Tensor
    group: Tensor
    notes: Mapping[str, Tensor]
    value: Tensor


class UnitRows(Reducer):
    """The steps in which each unit of a layer mattered most: reference samples (Achtibat et al. 2023).

    By relevance they are those of RelMax, by value those of ActMax. Beside them is how much each unit matters on
    average, in each group. Lists and averages are the same, bit by bit, in whatever order rows come, and however they
    are cut into parts.

    Args:
        count: how many steps of each unit, and of each group.
        key: the layer: the path of a module, or the key of a value; by default the only one with relevance.
        of: whether ``"relevance"`` or the ``"value"`` is looked at, which the method writes if ``values=[key]``.
        axis: that of the units, ``1`` the first after those of the batch; by default the only one.
        heads: how many equal parts side by side the axis has, each of which is a unit.
        pooled: whether an amount is the ``"sum"`` over the places of a unit, or their ``"max"`` (of what is against,
            their least).
        share: whether amounts are divided by the sum of their sizes over all units, so that steps in which much is
            explained do not come first for all of them.
        against: whether the steps with the most negative amounts are kept, too.
        notes: entries of the source that are noted of each step, one number each; by default those of :data:`NOTED`
            that it has.
        mask_key: truth values, if rows have them: false where a step is padding, which does not count.
        **options: those of :class:`~tdhook.datasets.reducing.Reducer`; ``by`` tells steps apart.

    Shapes:
        ``group``, ``count [groups]``; ``mean``, ``absolute [groups, units]``; ``amount``, ``row``, ``step``,
        ``position`` and notes ``[groups, sides, units, found]``, the largest first, of equal ones the first row; where
        there are fewer, the row is ``-1``. Of two sides the second is that of the most negative. ``position`` is where
        in the unit there is most, among its places, whose shape is ``places``.
    """

    def __init__(
        self,
        count: int,
        key: NestedKey | None = None,
        *,
        of: Literal["relevance", "value"] = "relevance",
        axis: int | None = None,
        heads: int | None = None,
        pooled: Literal["sum", "max"] = "sum",
        share: bool = False,
        against: bool = False,
        notes: Sequence[NestedKey] | None = None,
        mask_key: NestedKey | None = ("collector", "mask"),
        by: By | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(key, by=by, name=name)
        if count < 1:
            raise ValueError(f"at least one row is kept, got count={count}")
        for option, given, known in (("of", of, ("relevance", "value")), ("pooled", pooled, ("sum", "max"))):
            if given not in known:
                raise ValueError(f"{option}={given!r} is neither {known[0]!r} nor {known[1]!r}")
        if of == "value" and key is None:
            raise ValueError("of='value' looks at the values of a layer: name it, key=")
        if axis == 0:
            raise ValueError("axis=0 is that of the batch: 1 is the first of the layer's own")
        self.count, self.looks_at, self.axis, self.heads = count, of, axis, heads
        self.pooled, self.share, self.against = pooled, share, against
        self.notes = None if notes is None else tuple(map(unravel_key, notes))
        self.mask_key = None if mask_key is None else unravel_key(mask_key)

    @property
    def reads(self) -> list[NestedKey]:
        """Entries of the source that are read."""
        return [*super().reads, *(self.notes or ())]

    def part(self, piece: Piece) -> Part:
        steps = self._steps(piece)
        units, places = by_units(steps.value, self.axis, self.heads, self._layer)
        amount, position = self._amounts(units)
        if not bool(amount.isfinite().all()):
            odd = steps.row[(~amount[0].isfinite()).any(-1)][0]
            raise ValueError(f"{self._layer!r} is not finite in row {int(odd)}")
        groups, place = groups_of(steps.group)
        positive, negative = amount[0].clamp(min=0), -amount[0].clamp(max=0)
        found = {
            "group": groups,
            "count": torch.bincount(place, minlength=len(groups)),
            "for": _sums(positive, place, len(groups)),
            "against": _sums(negative, place, len(groups)),
            "places": torch.tensor(places, dtype=torch.int64),
        }
        of_steps = {"row": steps.row, "step": steps.step, **steps.notes}
        return {**found, **best(amount, position, of_steps, place, len(groups), self.count)}

    def merged(self, parts: Iterable[Part]) -> Part:
        few: Part | None = None
        for part in parts:
            few = part if few is None else self._both(few, part)
        return few or {}

    def result(self, part: Part) -> dict[str, Tensor]:
        count = part["count"].double().unsqueeze(-1)
        above, below = value_of(part["for"]), value_of(part["against"])
        listed = {name: value for name, value in part.items() if name not in ("for", "against")}
        return {**listed, "mean": (above - below) / count, "absolute": (above + below) / count}

    @property
    def _layer(self) -> NestedKey:
        return "the layer" if self.key is None else self.key

    def _steps(self, piece: Piece) -> _Steps:
        """The steps of a piece, in their order."""
        batch = piece.data.batch_size
        each = batch[1:].numel()
        value = self._looked_at(piece)
        if value.shape[: len(batch)] != batch:
            raise ValueError(f"{self._layer!r} is {tuple(value.shape)}, and the rows are {tuple(batch)}")
        row, step = piece.index.cpu().repeat_interleave(each), torch.arange(each).repeat(batch[0])
        order = torch.argsort(row, stable=True)
        valid = padding_told(piece.data, self.mask_key)
        if valid is not None:
            valid = valid.reshape(*batch, -1)[..., 0].reshape(-1).cpu().bool()
            order = order[valid[order]]
        notes = [key for key in NOTED if _is_number(piece.data, key)] if self.notes is None else self.notes
        whole = piece.data if callable(self.by) else piece.data.select(*notes, *super().reads, strict=False)
        data, row = whole.reshape(-1)[order], row[order]
        labels = labels_of(self.by, Piece(data, row, {}, {}))
        noted = {note_name(key): _note(data, key) for key in notes}
        in_steps = value.reshape(-1, *value.shape[len(batch) :])
        if len(order) < len(in_steps) or bool((order.diff() < 0).any()):
            in_steps = in_steps[order]
        return _Steps(row, step[order], labels, noted, in_steps)

    def _looked_at(self, piece: Piece) -> Tensor:
        """Relevance or values of the layer, ``[rows, *axes, *features]``."""
        values = {parts_of(key)[1:]: x for key, x in piece.entries.items() if parts_of(key)[0] == "value"}
        value = self._of_layer(values)
        if self.looks_at == "relevance":
            found = {parts_of(key): x for key, x in piece.relevance.items()}
            relevance = self._of_layer(found)
            relevance = self.of(piece) if relevance is None else relevance.cpu()
            if value is not None and relevance.dim() > value.dim():
                raise ValueError(
                    f"relevance of {self._layer!r} is that of {relevance.shape[piece.data.batch_dims]} outputs, each "
                    "explained for itself; what a unit matters is told of one: give the method a target that is one "
                    "number for each step"
                )
            return relevance
        if value is None:
            raise KeyError(
                f"the method writes no values of {self._layer!r}: give it values=[{self._layer!r}]"
            )
        return value.cpu()

    def _of_layer(self, found: Mapping[tuple[str, ...], Tensor]) -> Tensor | None:
        """What belongs to the layer; where the policy reads an entry of the row, ``"next"``, it lies under that."""
        key = parts_of(self.key)
        if not key:
            return None
        wanted = (*key[:-1], key[-1].removesuffix(":0"))
        among = [name for name in found if name[-len(key) :] == wanted]
        best = min(among, key=len, default=None)
        if best is None:
            return None
        if wanted == key and (*best[:-1], call_name(best[-1], 1)) in found:
            raise ValueError(
                f"the layer {self.key!r} was called several times: say which call, '{self.key}:0' is the first"
            )
        return found[best]

    def _amounts(self, units: Tensor) -> tuple[Tensor, Tensor]:
        """How much each unit is, ``[sides, steps, units]``, and where most of it is.

        Args:
            units: ``[steps, units, places]``.
        """
        ends = [units.max(-1)] + ([units.min(-1)] if self.against else [])
        position = torch.stack([end.indices for end in ends])
        if self.pooled == "sum":
            amount = units.sum(-1, dtype=torch.float64).expand(len(ends), -1, -1)
        else:
            amount = torch.stack([end.values for end in ends]).double()
        if self.share:
            whole = amount.abs().sum(-1, keepdim=True)
            amount = torch.where(whole > 0, amount / whole, 0.0)
        return amount, position

    def _both(self, one: Part, other: Part) -> Part:
        for name in ("places", "for"):
            if one[name].shape[1:-1] != other[name].shape[1:-1] or (
                name == "places" and not torch.equal(one[name], other[name])
            ):
                raise ValueError(f"{self._layer!r} has other axes in some of the rows")
        if one.keys() != other.keys():
            odd = ", ".join(sorted(one.keys() ^ other.keys()))
            raise ValueError(
                f"some of the rows have {odd} and others have not: say what is noted, notes=[...]"
            )
        groups, places = aligned([one, other])
        found: Part = {"group": groups, "places": one["places"]}
        for name in ("count", "for", "against"):
            total = torch.zeros((len(groups), *one[name].shape[1:]), dtype=torch.int64)
            for part, place in zip((one, other), places, strict=True):
                total[place] += part[name]
            found[name] = total if name == "count" else carried(total)
        return {**found, **both(one, other, places, len(groups), self.count)}


def _sums(amount: Tensor, place: Tensor, groups: int) -> Tensor:
    """Sums of amounts ``[steps, units]`` by group, ``[groups, units, digits]``."""
    units = amount.shape[1]
    cells = place.unsqueeze(-1) * units + torch.arange(units)
    return digits_of(amount.reshape(-1), cells.reshape(-1), groups * units).reshape(groups, units, DIGITS)


def _is_number(data: TensorDictBase, key: NestedKey) -> bool:
    value = data.get(key, None)
    return isinstance(value, Tensor) and value.numel() == data.batch_size.numel() and not value.is_complex()


def _note(data: TensorDictBase, key: NestedKey) -> Tensor:
    """A number for each step, ``[steps]``."""
    if not _is_number(data, key):
        value = data.get(key, None)
        shape = "" if value is None else f" of shape {tuple(value.shape[1:])}"
        raise KeyError(f"{key!r}{shape} is no number of each step to be noted; there are {known_keys(data)}")
    found: Tensor = data.get(key).reshape(-1).cpu().double()
    return found
