"""Reference samples: the steps of a data set in which each unit of a layer mattered most, or was largest."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor, nn

from tdhook.attribution.lrp import LRP
from tdhook.concepts.activations import Activations
from tdhook.concepts.found import Found
from tdhook.concepts.origins import Origin
from tdhook.concepts.reading import Reading, asked_of, explaining, is_path, path_of, root_of, written_at
from tdhook.concepts.reference_frames import UnitOf, reference_frames
from tdhook.concepts.spans import joined, none_seen, of_rows, overlap, unseen
from tdhook.contexts.attribution import Attribution, Shared
from tdhook.contexts.explained import ExplainedModule
from tdhook.datasets.explaining import Explaining, one_way
from tdhook.datasets.identity import Plain, described, difference
from tdhook.datasets.job import Job
from tdhook.datasets.reducing import By, Part, Piece
from tdhook.datasets.result import Result
from tdhook.datasets.rows import Source, as_rows
from tdhook.datasets.unit_rows import UnitRows
from tdhook.keys import known_keys, under
from tdhook.models.model import InKeys

if TYPE_CHECKING:
    import os

    from typing_extensions import Unpack

__all__ = ["ReferenceSamples"]

Self = TypeVar("Self", bound="ReferenceSamples")

_NAME = "units"
_ROWS, _BYTES = 256, 32 << 20
"""Rows that are explained before they are counted, so many or as many as have so many bytes."""


class ReferenceSamples:
    """What the units of a layer respond to: a fold over steps that were seen, of any number.

    By relevance, the steps in which a unit contributed most to what is explained of them (RelMax, Achtibat et al.
    2023); by value, those in which it was largest (ActMax). What is known is as large as the lists, whatever was read.
    Rows have numbers, and each is counted once; lists and averages are the same, bit by bit, in whatever order rows
    come and however they are cut into parts.

    Args:
        method: what is explained of each step, one number, and how.
        layer: the path of a module, or the key of a value inside a ``TensorDictSequential``.
        axis: that of its units, counted with the whole batch as one axis before it: ``1`` is the first of the layer's
            own. By default the only one.
        heads: how many equal parts side by side that axis has, each of which is a unit.
        top: how many steps are listed of each unit.
        by: ``"relevance"`` or ``"value"``.
        pooled: whether a unit is worth the ``"sum"`` over its places, or their ``"max"``.
        share: whether what units are worth is divided by the sum of its sizes over the layer.
        against: whether the steps with the most negative relevance are listed, too.
        groups: an entry of the data, as ``"action"``, or a function of steps that gives whole numbers: units have a
            list and an average in each group.
        notes: entries that are noted of each step in a list; by default steps, rewards, returns and trajectories, where
            the data have them (:data:`~tdhook.datasets.unit_rows.NOTED`).
        mask_key: truth values, if steps have them: false where a step is padding.

    Attributes:
        method: as it was given.
        layer: as it was given.
        reducer: does the counting, for a :class:`~tdhook.datasets.Job`.
        seen: the numbers of the rows that were counted, ``[spans, 2]``.
    """

    def __init__(
        self,
        method: Attribution,
        layer: NestedKey,
        *,
        axis: int | None = None,
        heads: int | None = None,
        top: int = 40,
        by: Literal["relevance", "value"] = "relevance",
        pooled: Literal["sum", "max"] = "sum",
        share: bool = False,
        against: bool = False,
        groups: By | None = None,
        notes: Sequence[NestedKey] | None = None,
        mask_key: NestedKey | None = ("collector", "mask"),
    ) -> None:
        if by not in ("relevance", "value"):
            raise ValueError(f"by={by!r} is neither 'relevance' nor 'value'")
        if top < 1:
            raise ValueError(f"at least one step is listed, got top={top}")
        self.method, self.layer, self.by = method, unravel_key(layer), by
        self.reducer = UnitRows(
            top,
            self.layer,
            axis=axis,
            heads=heads,
            pooled=pooled,
            share=share,
            against=against,
            notes=notes,
            mask_key=mask_key,
            by=groups,
            name=_NAME,
        )
        self.seen = none_seen()
        self._part: Part | None = None
        self._origin = Origin()

    def __repr__(self) -> str:
        rows = int(self.seen.diff(dim=-1).sum())
        return f"ReferenceSamples({self.method!r}, {self.layer!r}, by={self.by!r}; {rows} rows)"

    def asked(self, policy: nn.Module) -> Attribution:
        """The method, asked for the layer alone: what explains batches for :meth:`update`, or a job.

        Args:
            policy: the model, by which it is known whether the layer is a module or a key.
        """
        values = [path_of(self.layer)] if isinstance(self.layer, str) else [self.layer]
        is_module = is_path(policy, self.layer)
        options: Shared = {
            **asked_of(policy, self.layer),
            "attribution_key": self.method.attribution_key,
            "values": values if is_module else [self.layer],
        }
        if isinstance(self.method, LRP) and self.method.references is not None and self.by == "relevance":
            # It is the inputs that are compared with others, and the layer is what it is then.
            options["use_inputs"] = True
            options["attribute"] = None if is_module else "all"
        return Activations(**options) if self.by == "value" else self.method.asked(**options)

    def wrap(
        self, policy: nn.Module, in_keys: InKeys | None = None, out_keys: Sequence[NestedKey] | None = None
    ) -> ExplainedModule:
        """The policy, which also writes what :meth:`update` reads."""
        return self.asked(policy).wrap(policy, in_keys, out_keys)

    def update(self: Self, td: TensorDictBase, rows: Tensor | Sequence[int] | range | None = None) -> Self:
        """Count steps that were explained by :meth:`wrap`.

        Args:
            td: of any batch size. Its first axis is that of rows, and others are steps of a row.
            rows: their numbers, ``[rows]``; by default those after the last one.

        Raises:
            KeyError: the layer has no relevance there.
            ValueError: a row was counted before, or there is not a number for each.
        """
        batch = td if td.batch_dims else td.unsqueeze(0)
        count = batch.batch_size[0]
        first = int(self.seen[-1, 1]) if len(self.seen) else 0
        index = torch.arange(first, first + count) if rows is None else torch.as_tensor(rows).reshape(-1)
        if len(index) != count or index.is_floating_point():
            raise ValueError(f"there are {count} rows, and rows= are {len(index)} numbers of {index.dtype}")
        relevance, values = (_below(batch, key) for key in (self.method.attribution_key, "value"))
        if written_at(self.layer) not in relevance:
            raise KeyError(
                f"the batch has no relevance of {self.layer!r}: explain it by samples.wrap(policy); there are "
                f"{known_keys(td)}"
            )
        entries = {under("value", key): value for key, value in values.items()}
        self._add(Piece(batch, index.long(), relevance, entries))
        return self

    def fold(
        self: Self,
        policy: nn.Module,
        source: Source,
        rows: slice | range | None = None,
        *,
        piece: int | None = None,
        threads: int | None = None,
        **reading: Unpack[Reading],
    ) -> Self:
        """Explain the rows of a source that were not counted yet, and count them.

        It may be interrupted, and begun again, here or from :attr:`state`: what was counted is not counted again.

        Args:
            policy: what is explained; a copy of it, in evaluation mode.
            source: a TensorDict, a folder, a replay buffer, or what else a job reads
                (:data:`~tdhook.datasets.rows.Source`).
            rows: which of them, a stretch; by default all.
            piece: how many are read and explained before they are counted; by default by their size.
            threads: how many threads of torch compute, which decides how sums are rounded; by default as many as do.
            **reading: how rows are read, as a :class:`~tdhook.datasets.Job` does: ``prepare``, ``at``, ``in_keys``, ...

        Raises:
            ValueError: rows were counted with other weights, or rows of these numbers of another source.
        """
        data = as_rows(source)
        begin, end, step = (rows if isinstance(rows, slice) else _as_slice(rows)).indices(len(data))
        if step != 1:
            raise ValueError(f"rows= is one stretch of rows, and this one has steps of {step}")
        with one_way(torch.get_num_threads() if threads is None else threads):
            explained = explaining(self.asked(policy), policy, data, reading)
            again = end - begin - sum(b - a for a, b in unseen(begin, end, self.seen))
            origin = self._origin.followed_by(Origin.of(explained.model, data), again)
            size = _rows_together(explained) if piece is None else piece
            for first in range(begin // size * size, end, size):
                for a, b in [*unseen(max(first, begin), min(first + size, end), self.seen)]:
                    explained.anew(a)
                    self._add(explained.piece(a, b))
                    self._origin = origin
        return self

    def job(self, policy: nn.Module, source: Source, out: str | os.PathLike[str], **options: Any) -> Job:
        """A job that does the same with as many workers as there are, whose result :meth:`take` takes.

        Args:
            policy: what is explained.
            source: where rows come from.
            out: the folder of the job.
            **options: those of :class:`~tdhook.datasets.Job`; nothing is kept of rows unless ``keep`` says so.
        """
        reduce = [self.reducer, *options.pop("reduce", ())]
        return Job(self.asked(policy), policy, source, out, **{"keep": None, **options}, reduce=reduce)

    def take(self: Self, result: Result, checkpoint: int = 0) -> Self:
        """Count the rows of a job (:meth:`job`), besides those that were counted before.

        Args:
            result: of the job, perhaps a partial one.
            checkpoint: with whose weights.

        Raises:
            ValueError: the job counted others, or in another way, or was given some rows of its source alone.
        """
        told, mine = result.stored.folder.told()["reduce"], json.loads(json.dumps(described(self.reducer)))
        of_job = [one for one in told if isinstance(one, dict)] if isinstance(told, list) else []
        found = difference(mine, next((one for one in of_job if one.get("name") == _NAME), None))
        if found is not None:
            raise ValueError(
                f"the job counted otherwise, which differs in {found}: make it by samples.job(...)"
            )
        source = result.stored.folder.told()["source"]
        if isinstance(source, dict) and source.get("chosen") != described(str(None)):
            raise ValueError(
                "the job was given some rows of its source, and numbers these from 0, so that rows of the source would "
                "be called otherwise: give a job all of them, or count some by fold(policy, source, rows)"
            )
        done = result.done.reshape(-1, result.done.shape[-1])[checkpoint]
        part = result.merged_of(checkpoint).get(_NAME)
        if part is not None:
            origin = self._origin.followed_by(Origin.of_job(result))
            self._join(of_rows(done.nonzero()[:, 0]), part)
            self._origin = origin
        return self

    def merge(self: Self, other: ReferenceSamples) -> Self:
        """Count what another one has counted: other rows, in the same way.

        Raises:
            ValueError: rows were counted by both, or it counts otherwise.
        """
        return self.load(other.state, beside=True)

    @property
    def state(self) -> TensorDict:
        """All that is known, to be saved, ``state.memmap(folder)`` or as tensors, and given to :meth:`load`."""
        told = {"made": self._makeup(), "of": self._origin.as_data()}
        makeup = torch.frombuffer(bytearray(json.dumps(told).encode()), dtype=torch.uint8)
        part = TensorDict({} if self._part is None else dict(self._part), [])
        return TensorDict({"makeup": makeup, "seen": self.seen, "part": part}, [])

    def load(self: Self, state: TensorDictBase, *, beside: bool = False) -> Self:
        """Go on from a state.

        Args:
            state: of the same samples (:attr:`state`).
            beside: whether what is known already stays, and this is other rows.

        Raises:
            ValueError: it is that of samples that count otherwise.
        """
        told = json.loads(bytes(state.get("makeup").cpu().tolist()).decode())
        found = difference(self._makeup(), told["made"])
        if found is not None:
            raise ValueError(f"these samples count otherwise, which differs in {found}")
        part = {name: value.cpu().clone() for name, value in state.get("part").items()}
        if not beside:
            self.seen, self._part, self._origin = none_seen(), None, Origin()
        origin = self._origin.followed_by(Origin.from_data(told["of"]))
        if part:
            self._join(state.get("seen").cpu().clone(), part)
        self._origin = origin
        return self

    def _makeup(self) -> Plain:
        made: Plain = {
            "by": self.by,
            "units": described(self.reducer),
            "method": described(self.method) if self.by == "relevance" else None,
        }
        found: Plain = json.loads(json.dumps(made))
        return found

    def _add(self, piece: Piece) -> None:
        if not len(piece.index):
            return
        self._join(of_rows(piece.index), self.reducer.part(piece))

    def _join(self, spans: Tensor, part: Part) -> None:
        """Take in what is known of other rows; nothing is changed where that is not possible."""
        twice = overlap(self.seen, spans)
        if twice is not None:
            raise ValueError(f"rows {twice[0]} to {twice[1] - 1} were counted before: each is counted once")
        self._part = part if self._part is None else self.reducer.merged([self._part, part])
        self.seen = joined(self.seen, spans)

    @property
    def found(self) -> Found:
        """What was found of the rows that were counted.

        Raises:
            RuntimeError: none were.
        """
        if self._part is None:
            raise RuntimeError("no rows were counted yet: give some to update(td) or fold(policy, source)")
        return Found(self.reducer.result(self._part))

    def frames(
        self,
        policy: nn.Module,
        source: Source,
        unit: int,
        *,
        group: int | None = None,
        against: bool = False,
        count: int | None = None,
        apart: int = 1,
        fields: bool = True,
        **reading: Unpack[Reading],
    ) -> TensorDict:
        """The steps in which a unit mattered most, as they are in the data, with its relevance inside them.

        Args:
            policy: what is explained.
            source: the data whose rows were counted.
            unit: its number.
            group: in which group; by default in any.
            against: whether those in which it spoke most against what is explained.
            count: how many; by default all that are listed.
            apart: how many rows are between any two of them, at the least.
            fields: whether to find the part of the input that the unit sees.
            **reading: how rows are read, as for :meth:`fold`.

        Returns:
            ``[found]``: what :meth:`Found.best` gives; the rows, ``"data"``; ``("attr", key)``, the relevance of each
            input that passes the unit (:class:`~tdhook.targets.Through`); and ``("field", key)``, ``[found, 2, axes]``,
            the box around what the unit depends on at the place where there is most of it. Of rows that are
            trajectories, data and relevance are whole trajectories, ``[found, time, ...]``: what each of their steps
            gave to the unit in that one of them which ``"step"`` tells. The first axis of the box is time.

        Raises:
            ValueError: these are other data than those that were counted, or other weights.
        """
        best = self.found.best(unit, group, against=against, count=count, apart=apart)
        if self._origin.source is not None:
            self._origin.followed_by(Origin.of(root_of(policy), as_rows(source)), len(best))
        one = UnitOf(self.layer, unit, self.found.units, self.reducer.axis, self.reducer.heads)
        return reference_frames(self.method, one, policy, source, best, reading, fields=fields)


def _rows_together(explained: Explaining) -> int:
    """How many rows are explained before they are counted: a multiple of those that one pass takes."""
    first = explained.piece(0, min(2, len(explained.rows)))
    found = sum(x.numel() * x.element_size() for x in first.entries.values()) // len(first.index)
    steps: int = first.data.batch_size[1:].numel()
    at_once = max(1, (explained.recorded.at_once or 1) // max(1, steps))
    return max(1, min(_ROWS, _BYTES // max(1, found)) // at_once) * at_once


def _below(td: TensorDictBase, key: NestedKey) -> dict[NestedKey, Tensor]:
    """The entries below a key, by the rest of their own."""
    found = td.get(key, None)
    if not isinstance(found, TensorDictBase):
        return {}
    return {unravel_key(name): value for name, value in found.items(True, True)}


def _as_slice(rows: range | None) -> slice:
    return slice(None) if rows is None else slice(rows.start, rows.stop, rows.step)
