"""What a job has made: rows, what they were reduced to, how far it is, and whether it is as it was written."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook.datasets.chunks import Chunks
from tdhook.datasets.claims import ClaimFiles, Claims, this_worker
from tdhook.datasets.folder import JobFolder
from tdhook.datasets.layout import Layout
from tdhook.datasets.reducing import Reducer
from tdhook.datasets.units import Units
from tdhook.rl.saved import load

__all__ = ["Blocks", "Result", "Status", "Verified"]


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
        done = folder.all_done()
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
    """

    done: Tensor
    _chunks: Chunks
    _there: frozenset[int]

    @classmethod
    def of(cls, chunks: Chunks, *, partial: bool) -> Result:
        """What is in a folder."""
        folder, units = chunks.folder, chunks.units
        there = folder.all_done()
        if len(there) < len(units) and not partial:
            raise RuntimeError(
                f"{len(there)} of {len(units)} chunks are done: call work() until all are, or ask for what there is, "
                "result(partial=True)"
            )
        if len(there) == len(units):
            folder.finish_rows()
        if chunks.maps_rows and there:
            folder.check_rows(chunks.layout, chunks.batch)
        done = torch.zeros(units.checkpoints * units.rows, dtype=torch.bool)
        for unit in there:
            begin, end = units.span(unit)
            first = units.checkpoint(unit) * units.rows
            done[first + begin : first + end] = True
        shape = (len(chunks.checkpoints), units.rows) if chunks.checkpoints else (units.rows,)
        return cls(done.reshape(shape), chunks, frozenset(there))

    @property
    def checkpoints(self) -> tuple[str, ...]:
        """The names of the checkpoints."""
        return tuple(self._chunks.checkpoints)

    @property
    def reducers(self) -> Mapping[str, Reducer]:
        """What rows were reduced by."""
        return self._chunks.reducers

    @property
    def keeps_rows(self) -> bool:
        """Whether what was kept of rows can be read."""
        return self._chunks.keep is not None

    @property
    def attribution_key(self) -> NestedKey:
        """Where relevance is in rows."""
        return self._chunks.explaining.method.attribution_key

    def read(self, begin: int, end: int, checkpoint: int = 0) -> TensorDictBase:
        """Rows ``begin`` to ``end`` as they were kept, ``[end - begin, ...]``.

        Raises:
            RuntimeError: nothing was kept, or they are not explained yet.
        """
        if self._chunks.compressed:
            return self.blocks(checkpoint).read(begin, end)
        rows = self.rows
        return rows[checkpoint, begin:end] if rows.batch_dims > 1 else rows[begin:end]

    @cached_property
    def rows(self) -> TensorDictBase:
        """What was kept, memory-mapped, ``[rows, ...]`` or ``[checkpoints, rows, ...]``.

        Raises:
            RuntimeError: nothing was kept, or not as rows, or rows are missing: :attr:`explained` has those there are.
        """
        if self._chunks.keep is None:
            raise RuntimeError("no rows were kept (keep=None): what they were reduced to is in .reduced")
        if self._chunks.keep.compressed:
            raise RuntimeError("rows are in compressed blocks: read them by .blocks()")
        if not bool(self.done.all()):
            raise RuntimeError(
                "not all rows are explained, and the others would be taken for rows without relevance: those that are "
                "there are in .explained"
            )
        return load(self._chunks.folder.rows)

    @cached_property
    def explained(self) -> TensorDictBase:
        """The rows that are there, ``[explained, ...]``, in the order of :attr:`done`."""
        if self._chunks.keep is None or self._chunks.keep.compressed:
            return self.rows  # says why not
        home = (
            self._chunks.folder.rows if self._chunks.folder.rows.is_dir() else self._chunks.folder.unfinished
        )
        found = load(home)
        return found.reshape(-1)[self.done.reshape(-1)]

    def blocks(self, checkpoint: int = 0) -> Blocks:
        """Compressed rows of a checkpoint.

        Raises:
            RuntimeError: rows are not compressed.
        """
        if not self._chunks.compressed:
            raise RuntimeError("rows are not in compressed blocks: they are in .rows")
        return Blocks(self._chunks.folder, self._chunks.units, self._chunks.layout, checkpoint, self._there)

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
        first = checkpoint * self._chunks.units.chunks
        units = [unit for unit in sorted(self._there) if 0 <= unit - first < self._chunks.units.chunks]
        found: dict[str, TensorDict] = {}
        for name, reducer in self._chunks.reducers.items():
            if units:
                merged = reducer.merged(self._chunks.folder.read_part(unit)[name] for unit in units)
                found[name] = TensorDict(reducer.result(merged), [])
        return found
