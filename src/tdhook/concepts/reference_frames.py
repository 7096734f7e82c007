"""Reference frames: the steps a unit responds to, with its relevance inside them, and the part of them that it sees."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor, nn

from tdhook.concepts.activations import Activations
from tdhook.concepts.reading import Reading, asked_of, explaining, is_path, root_of, written_at
from tdhook.concepts.receptive_fields import box_of, on_device_of, receptive_fields
from tdhook.contexts.attribution import Attribution
from tdhook.datasets.rows import Rows, Source, as_rows, chosen
from tdhook.datasets.unit_rows import by_units
from tdhook.keys import parts_of, under
from tdhook.targets.base import Seeder
from tdhook.targets.through import Through

__all__ = ["UnitOf", "reference_frames"]

_FIELD = "field"


@dataclass(frozen=True)
class UnitOf:
    """A unit of a layer.

    Attributes:
        layer: the path of a module, or a key.
        number: that of the unit.
        axis: that of the units, as :class:`~tdhook.targets.Through` counts it.
        heads: how many equal parts it has, each of which is a unit.
    """

    layer: NestedKey
    number: int
    axis: int | None
    heads: int | None

    def through(self, target: Seeder) -> Through:
        """What of a target passes the unit."""
        return Through(target, self.layer, self.number, axis=self.axis, heads=self.heads)

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

    Raises:
        NotImplementedError: rows are trajectories.
    """
    if reading.get("trajectories", False):
        raise NotImplementedError(
            "a unit in one step of a trajectory depends on the steps before it: explain the whole trajectory, "
            "LRP(..., target=Through(target, layer, unit))"
        )
    rows = chosen(as_rows(source), best.get("row"))
    asked = method.asked(
        target=unit.through(method.seeder), input_modules=None, use_inputs=True, values=False
    )
    piece = explaining(asked, policy, rows, reading).piece(0, len(rows))
    batch, step = piece.data.batch_size, best.get("step")
    found = best.copy()
    found.set("data", _steps(piece.data, step))
    for key, value in piece.relevance.items():
        flat = value.reshape(len(value), batch[1:].numel(), *value.shape[len(batch) :])
        found.set(under("attr", key), flat[torch.arange(len(flat)), step])
    if fields:
        for key, box in _fields(unit, policy, rows, best, reading).items():
            found.set(under(_FIELD, key), box)
    return found


def _steps(data: TensorDictBase, step: Tensor) -> TensorDictBase:
    """Rows ``[rows, *axes]`` as one step of each, ``[rows]``."""
    return data if data.batch_dims == 1 else data.reshape(len(data), -1)[torch.arange(len(data)), step]


def _fields(
    unit: UnitOf, policy: nn.Module, rows: Rows, best: TensorDict, reading: Reading
) -> dict[NestedKey, Tensor]:
    """The box around what a unit depends on where there is most of it, ``[rows, 2, axes]`` by input."""
    is_module, root = is_path(policy, unit.layer), root_of(policy)
    whole, prepare, at = rows.read(0, len(rows)), reading.get("prepare"), parts_of(reading.get("at"))
    td = _steps(whole if prepare is None else prepare(whole), best.get("step"))
    td = td.get(at) if at else td
    seen = Activations(**asked_of(policy, unit.layer))
    value = seen.wrap(root, reading.get("in_keys"), reading.get("out_keys"))(
        on_device_of(root, td[:1].copy())
    )
    place = unit.places(best.get("position"), value.get(under("attr", written_at(unit.layer))).shape[1:])
    depends = receptive_fields(
        root,
        unit.layer,
        td,
        place,
        is_module=is_module,
        in_keys=reading.get("in_keys"),
        out_keys=reading.get("out_keys"),
    )
    return {
        under(parts_of(reading.get("at")), key): box_of(depends.get(key)) for key in depends.keys(True, True)
    }
