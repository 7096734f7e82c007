"""Reference frames: the steps a unit responds to, with its relevance inside them, and the part of them that it sees."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor, nn

from tdhook.concepts.activations import Activations
from tdhook.concepts.reading import Reading, asked_of, explaining, is_path, root_of, written_at
from tdhook.concepts.receptive_fields import box_of, on_device_of, receptive_fields
from tdhook.contexts.attribution import Attribution
from tdhook.contexts.recorded import recurrent
from tdhook.datasets.explaining import Explaining
from tdhook.datasets.rows import Source, as_rows, chosen
from tdhook.datasets.unit_rows import by_units
from tdhook.keys import ASKED, parts_of, under
from tdhook.targets.base import Seeder
from tdhook.targets.outputs import Key
from tdhook.targets.through import Through

__all__ = ["UnitOf", "reference_frames"]

_FIELD = "field"
_MARKS = (ASKED, "unit")
"""The entry that marks the unit in the step in which it mattered, where rows are trajectories."""


@dataclass(frozen=True)
class UnitOf:
    """A unit of a layer.

    Attributes:
        layer: the path of a module, or a key.
        number: that of the unit.
        among: how many units the layer has.
        axis: that of the units, as :class:`~tdhook.targets.Through` counts it.
        heads: how many equal parts it has, each of which is a unit.
    """

    layer: NestedKey
    number: int
    among: int
    axis: int | None
    heads: int | None

    def through(self, target: Seeder, *, marked: bool = False) -> Through:
        """What of a target passes the unit.

        Args:
            target: what is explained.
            marked: whether it passes it in those steps alone that an entry marks.
        """
        units = Key(_MARKS) if marked else self.number
        return Through(target, self.layer, units, axis=self.axis, heads=self.heads)

    def marks(self, batch: torch.Size, step: Tensor) -> Tensor:
        """Truth values ``[rows, *axes, units]``: the unit in one step ``[rows]`` of each row ``[rows, *axes]``."""
        found = torch.zeros(len(step), batch[1:].numel(), self.among, dtype=torch.bool)
        found[torch.arange(len(step)), step, self.number] = True
        return found.reshape(*batch, self.among)

    def places(self, position: Tensor, features: torch.Size) -> Tensor:
        """Positions in the unit as places among all features of the layer, one after the other."""
        numbers = torch.arange(features.numel()).reshape(1, *features)
        return by_units(numbers, self.axis, self.heads, self.layer)[0][0, self.number][position]


def reference_frames(
    method: Attribution,
    unit: UnitOf,
    policy: nn.Module,
    source: Source,
    best: TensorDict,
    reading: Reading,
    *,
    fields: bool = True,
) -> TensorDict:
    """Steps with the relevance of a unit inside them.

    Args:
        method: what is explained of each step, and how.
        unit: the unit.
        policy: what is explained.
        source: the data.
        best: the steps, ``[found]``: their ``row``, ``step`` and ``position``.
        reading: how rows are read.
        fields: whether to find the part of the input that the unit sees.

    Returns:
        As :meth:`~tdhook.concepts.ReferenceSamples.frames` describes it.
    """
    whole = reading.get("trajectories", False)
    through = unit.through(method.seeder, marked=whole)
    asked = method.asked(target=through, input_modules=None, use_inputs=True, values=False)
    # Means and samples that are compared with are those of all of the source.
    explained = explaining(asked, policy, as_rows(source), reading)
    data, relevance = _explained(explained, unit, best, reading)
    batch, step = data.batch_size, best.get("step")
    data = data if whole else _steps(data, step)
    found = best.copy()
    found.set("data", data)
    for key, value in relevance.items():
        if not whole:
            flat = value.reshape(len(value), batch[1:].numel(), *value.shape[len(batch) :])
            value = flat[torch.arange(len(flat)), step]
        found.set(under("attr", key), value)
    if fields:
        for key, box in _fields(unit, policy, data, explained, best, reading).items():
            found.set(under(_FIELD, key), box)
    return found


def _explained(
    explained: Explaining, unit: UnitOf, best: TensorDict, reading: Reading
) -> tuple[TensorDictBase, Mapping[NestedKey, Tensor]]:
    """The rows of some steps as they are read, and their relevance."""
    index = best.get("row")
    if reading.get("in_order", False) and len(index):  # each beside the rows that came before it
        pieces = [explained.piece(row, row + 1) for row in index.tolist()]
        relevance = {key: torch.cat([one.relevance[key] for one in pieces]) for key in pieces[0].relevance}
        return TensorDict.cat([one.data for one in pieces]), relevance
    explained.rows = rows = chosen(explained.rows, index)
    if not reading.get("trajectories", False):
        piece = explained.piece(0, len(rows))
        return piece.data, piece.relevance
    read = rows.read(0, len(rows))
    data = read if explained.prepare is None else explained.prepare(read)
    marked, at = data.copy(), parts_of(reading.get("at"))
    batch = marked.get(at).batch_size if at else marked.batch_size
    marked.set(under(at, _MARKS), unit.marks(batch, best.get("step")))
    explained.rows, explained.prepare = as_rows(marked), None
    return data, explained.piece(0, len(rows)).relevance


def _steps(data: TensorDictBase, step: Tensor) -> TensorDictBase:
    """Rows ``[rows, *axes]`` as one step of each, ``[rows]``."""
    return data if data.batch_dims == 1 else data.reshape(len(data), -1)[torch.arange(len(data)), step]


def _fields(
    unit: UnitOf,
    policy: nn.Module,
    data: TensorDictBase,
    explained: Explaining,
    best: TensorDict,
    reading: Reading,
) -> dict[NestedKey, Tensor]:
    """The box around what a unit depends on where there is most of it, ``[rows, 2, axes]`` by input.

    Args:
        unit: the unit.
        policy: what is explained.
        data: the steps, ``[rows]``, or trajectories, ``[rows, *axes, time]``.
        explained: what has explained them.
        best: the steps.
        reading: how rows are read.
    """
    is_module, root, at = is_path(policy, unit.layer), root_of(policy), parts_of(reading.get("at"))
    td = data.get(at) if at else data
    seen = Activations(**asked_of(policy, unit.layer))
    with recurrent() if td.batch_dims > 1 else nullcontext():
        value = seen.wrap(root, reading.get("in_keys"), reading.get("out_keys"))(
            on_device_of(root, td[:1].copy())
        ).get(under("attr", written_at(unit.layer)))
        place = unit.places(best.get("position"), value.shape[td.batch_dims :])
        rows, at_once = td.batch_size, None
        if td.batch_dims > 1:
            places = place.new_full((len(place), rows[1:].numel()), -1)
            places[torch.arange(len(place)), best.get("step")] = place
            place = places.reshape(rows)
            at_once = max(1, (explained.recorded.at_once or 1) // rows[1:].numel())
        depends = receptive_fields(
            root,
            unit.layer,
            td,
            place,
            is_module=is_module,
            in_keys=reading.get("in_keys"),
            out_keys=reading.get("out_keys"),
            at_once=at_once,
        )
    return {under(at, key): box_of(depends.get(key)) for key in depends.keys(True, True)}
