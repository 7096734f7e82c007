"""What a job has made: rows, what they were reduced to, how far it is, and whether it is as it was written."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook.datasets.claims import ClaimFiles, Claims, this_worker
from tdhook.datasets.folder import JobFolder
from tdhook.datasets.layout import Layout
from tdhook.datasets.reducing import Part, Reducer
from tdhook.datasets.stored import Stored, stored_in
from tdhook.datasets.units import Units
from tdhook.rl.saved import load

__all__ = ["Blocks", "Result", "Status", "Verified", "open_result", "status_of"]


@dataclass(frozen=True)
class Status:
    """How far a job is.

    Attributes:
        done: rows that are done, over all checkpoints.
        rows: rows that there are, over all checkpoints.
        chunks_done: chunks that are done.
        chunks: chunks that there are.
        at_work: chunks that workers are at.
        abandoned: of these, how many by workers of this machine that are no more.
        per_second: rows per second lately, over all workers; 0 where nothing tells.
    """

    done: int
    rows: int
    chunks_done: int
    chunks: int
    at_work: int
    abandoned: int
    per_second: float

    @property
    def finished(self) -> bool:
        """Whether all is done."""
        return self.chunks_done == self.chunks

    @property
    def seconds_left(self) -> float:
        """How long it takes from here, if it goes on as lately."""
        left = self.rows - self.done
        return left / self.per_second if self.per_second else (0.0 if not left else float("inf"))

    @classmethod
    def of(cls, folder: JobFolder, units: Units) -> Status:
        """What a folder says."""
        done = units.among(folder.all_done())
        spans = {unit: units.span(unit) for unit in done}
        rows = sum(end - begin for begin, end in spans.values())
        worker = this_worker()
        claims = Claims(ClaimFiles(folder.claims, worker.name), worker, math.inf)
        held = claims.held() - done
        gone = sum(claims.is_stale(unit) for unit in held)
        lately = folder.times(done, 256)
        rate = 0.0
        if len(lately) > 1:
            (first, begun), (_, last) = lately[0], lately[-1]
            between = sum(spans[unit][1] - spans[unit][0] for unit, _ in lately if unit != first)
            now = last if len(done) == len(units) else max(last, time.time())
            rate = between / max(1e-9, now - begun)
        return cls(rows, units.rows * units.checkpoints, len(done), len(units), len(held) - gone, gone, rate)


@dataclass(frozen=True)
class Verified:
    """What :meth:`~tdhook.datasets.job.Job.verify` found.

    Attributes:
        chunks: how many chunks were read.
        changed: those whose bytes are not those that were written, or that are gone.
        again: those that were explained again.
        differ: of these, those that came out otherwise.
    """

    chunks: int
    changed: tuple[int, ...]
    again: tuple[int, ...]
    differ: tuple[int, ...]

    @property
    def ok(self) -> bool:
        """Whether all is as it should be."""
        return not self.changed and not self.differ


class Blocks:
    """Rows in compressed blocks, decompressed as they are read: ``blocks[3:7]``, ``blocks[12]``.

    Args:
        folder: where they lie.
        units: which rows are in which.
        layout: their entries.
        checkpoint: whose rows.
        there: the chunks that are done.
    """

    def __init__(
        self, folder: JobFolder, units: Units, layout: Layout, checkpoint: int, there: frozenset[int]
    ) -> None:
        self._folder, self._units, self._layout = folder, units, layout
        self._first, self._there = checkpoint * units.chunks, there
        self._last: tuple[int, dict[NestedKey, Tensor]] | None = None

    def __len__(self) -> int:
        return self._units.rows

    def __getitem__(self, which: int | slice) -> TensorDict:
        """Some rows, ``[rows, ...]``, or one.

        Raises:
            IndexError: there is no such row.
            RuntimeError: it is not explained yet.
        """
        if isinstance(which, slice):
            begin, end, step = which.indices(len(self))
            if step != 1:
                return torch.stack([self[i] for i in range(begin, end, step)])
            return self.read(begin, max(begin, end))
        row = which + len(self) if which < 0 else which
        if not 0 <= row < len(self):
            raise IndexError(f"there is no row {which} of {len(self)}")
        return self.read(row, row + 1)[0]

    def read(self, begin: int, end: int) -> TensorDict:
        """Rows ``begin`` to ``end``, ``[end - begin, ...]``."""
        chunk = self._units.chunk
        parts = []
        for unit in range(begin // chunk, -(-end // chunk) if end > begin else begin // chunk):
            first, last = self._units.span(unit)
            a, b = max(begin, first) - first, min(end, last) - first
            parts.append({key: value[a:b] for key, value in self._block(unit, last - first).items()})
        td = TensorDict({}, [end - begin])
        for key, (shape, dtype) in self._layout.entries.items():
            empty = torch.zeros((0, *shape), dtype=dtype)
            td.set(key, torch.cat([part[key] for part in parts]) if parts else empty)
        return td

    def _block(self, unit: int, count: int) -> dict[NestedKey, Tensor]:
        number = self._first + unit
        if number not in self._there:
            begin, end = self._units.span(unit)
            raise RuntimeError(f"rows {begin} to {end - 1} are not explained yet")
        if self._last is None or self._last[0] != number:
            self._last = number, self._folder.read_block(number, count, self._layout)
        return self._last[1]


@dataclass(frozen=True)
class Result:
    """What a job has made.

    Attributes:
        done: ``[rows]`` or ``[checkpoints, rows]``, which rows are explained.
        stored: what is in the folder, and where.
    """

    done: Tensor
    stored: Stored
    _there: frozenset[int]

    @classmethod
    def of(cls, stored: Stored, *, partial: bool) -> Result:
        """What is in a folder."""
        folder, units = stored.folder, stored.units
        there = units.among(folder.all_done())
        if len(there) < len(units) and not partial:
            raise RuntimeError(
                f"{len(there)} of {len(units)} chunks are done: call work() until all are, or ask for what there is, "
                "result(partial=True)"
            )
        if len(there) == len(units):
            folder.finish_rows()
        if stored.maps_rows and there:
            folder.check_rows(stored.layout, stored.batch)
        done = torch.zeros(units.checkpoints * units.rows, dtype=torch.bool)
        for unit in there:
            begin, end = units.span(unit)
            first = units.checkpoint(unit) * units.rows
            done[first + begin : first + end] = True
        shape = (len(stored.checkpoints), units.rows) if stored.checkpoints else (units.rows,)
        return cls(done.reshape(shape), stored, frozenset(there))

    @property
    def checkpoints(self) -> tuple[str, ...]:
        """The names of the checkpoints."""
        return self.stored.checkpoints

    @property
    def reducers(self) -> Mapping[str, Reducer]:
        """What rows were reduced by."""
        return self.stored.reducers

    @property
    def keeps_rows(self) -> bool:
        """Whether what was kept of rows can be read."""
        return self.stored.keeps

    @property
    def attribution_key(self) -> NestedKey:
        """Where relevance is in rows."""
        return self.stored.attribution_key

    def read(self, begin: int, end: int, checkpoint: int = 0) -> TensorDictBase:
        """Rows ``begin`` to ``end`` as they were kept, ``[end - begin, ...]``.

        Raises:
            RuntimeError: nothing was kept, or they are not explained yet.
        """
        if self.stored.compressed:
            return self.blocks(checkpoint).read(begin, end)
        rows = self.rows
        return rows[checkpoint, begin:end] if rows.batch_dims > 1 else rows[begin:end]

    @cached_property
    def rows(self) -> TensorDictBase:
        """What was kept, memory-mapped, ``[rows, ...]`` or ``[checkpoints, rows, ...]``.

        Raises:
            RuntimeError: nothing was kept, or not as rows, or rows are missing: :attr:`explained` has those there are.
        """
        if not self.stored.keeps:
            raise RuntimeError("no rows were kept (keep=None): what they were reduced to is in .reduced")
        if self.stored.compressed:
            raise RuntimeError("rows are in compressed blocks: read them by .blocks()")
        if not bool(self.done.all()):
            raise RuntimeError(
                "not all rows are explained, and the others would be taken for rows without relevance: those that are "
                "there are in .explained"
            )
        return load(self.stored.folder.rows)

    @cached_property
    def explained(self) -> TensorDictBase:
        """The rows that are there, ``[explained, ...]``, in the order of :attr:`done`."""
        if not self.stored.keeps or self.stored.compressed:
            return self.rows  # says why not
        home = self.stored.folder.rows if self.stored.folder.rows.is_dir() else self.stored.folder.unfinished
        found = load(home)
        return found.reshape(-1)[self.done.reshape(-1)]

    def blocks(self, checkpoint: int = 0) -> Blocks:
        """Compressed rows of a checkpoint.

        Raises:
            RuntimeError: rows are not compressed.
        """
        if not self.stored.compressed:
            raise RuntimeError("rows are not in compressed blocks: they are in .rows")
        return Blocks(self.stored.folder, self.stored.units, self.stored.layout, checkpoint, self._there)

    def beside(self, data: TensorDictBase) -> TensorDictBase:
        """The data that were explained, ``[rows, ...]``, with what was kept beside, none of it copied.

        Raises:
            ValueError: these are other data.
        """
        rows = self.rows
        if data.batch_size[: rows.batch_dims] != rows.batch_size:
            raise ValueError(
                f"the data are {tuple(data.batch_size)}, and what was explained {tuple(rows.batch_size)}"
            )
        return data.copy().update(rows)

    @cached_property
    def reduced(self) -> dict[str, TensorDict]:
        """What rows were reduced to, by the name of the reducer; of the first checkpoint, where there are several."""
        return self.reduced_of(0)

    def reduced_of(self, checkpoint: int) -> dict[str, TensorDict]:
        """What rows were reduced to with the weights of a checkpoint, by the name of the reducer."""
        return {
            name: TensorDict(self.stored.reducers[name].result(part), [])
            for name, part in self.merged_of(checkpoint).items()
        }

    def merged_of(self, checkpoint: int) -> dict[str, Part]:
        """What reducers know of the rows that are done with the weights of a checkpoint, by the name of the reducer."""
        first = checkpoint * self.stored.units.chunks
        units = [unit for unit in sorted(self._there) if 0 <= unit - first < self.stored.units.chunks]
        return {
            name: reducer.merged(self.stored.folder.read_part(unit)[name] for unit in units)
            for name, reducer in self.stored.reducers.items()
            if units
        }


def open_result(
    folder: str | os.PathLike[str], *, partial: bool = False, reducers: Sequence[Reducer] = ()
) -> Result:
    """What a job has made, from its folder alone: neither policy nor source is needed.

    Args:
        folder: of the job.
        partial: whether it may be of those rows alone that are done.
        reducers: those of the job whose classes are your own.

    Raises:
        FileNotFoundError: it is no job folder.
        RuntimeError: not all is done, and ``partial`` was not said.
        ValueError: the manifest cannot be read.
    """
    return Result.of(stored_in(JobFolder(folder), reducers), partial=partial)


def status_of(folder: str | os.PathLike[str]) -> Status:
    """How far a job is, from its folder alone.

    Raises:
        FileNotFoundError: it is no job folder.
    """
    home = JobFolder(folder)
    return Status.of(home, stored_in(home).units)
