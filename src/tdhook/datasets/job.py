"""A job: a data set explained once, by as many processes as there are, started by whatever starts processes."""

from __future__ import annotations

import os
import platform
import random
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from tensordict.utils import NestedKey
from torch import Tensor, nn

import tdhook
from tdhook.contexts.attribution import Attribution
from tdhook.contexts.explained import ExplainedModule
from tdhook.datasets.checkpoints import Checkpoint
from tdhook.datasets.chunks import Chunks
from tdhook.datasets.claims import ClaimFiles, Claims, this_worker
from tdhook.datasets.explaining import Explaining, Prepare, one_way
from tdhook.datasets.folder import JobFolder
from tdhook.datasets.identity import Plain, described, module_identity
from tdhook.datasets.keeping import Kept, as_kept
from tdhook.datasets.reducers import as_names
from tdhook.datasets.reducing import Reducer
from tdhook.datasets.result import Result, Status, Verified
from tdhook.datasets.rows import Source, as_rows, chosen, require_in_order, rows_identity
from tdhook.datasets.turns import Turns
from tdhook.datasets.units import Place
from tdhook.keys import parts_of
from tdhook.models.model import InKeys
from tdhook.models.parallel import is_elsewhere, unwrapped

__all__ = ["Job"]

_FORMAT = 1


class Job:
    """Explains each row of a data set, once, and writes what is kept of it into a folder.

    Any number of processes make the same job and call :meth:`work`; they meet in the folder and need nothing else of
    each other. Rows are explained in chunks. The bytes that are written are the same for any number of workers,
    whichever of them dies, however often the work is begun again.

    Args:
        method: what is explained and how; any method, target and baseline. Means and samples are those of 1024 of the
            rows that are explained, evenly spread over them, unless the baseline has data of its own.
        policy: the policy or critic. A copy of it is explained, in evaluation mode.
        source: where rows come from (:data:`~tdhook.datasets.rows.Source`).
        out: the job folder.
        rows: which rows; by default all. A slice, numbers, or a truth value for each. Results number them from 0 on, in
            this order.
        in_keys: as in ``method.wrap``.
        out_keys: as there.
        at: the entry of a row that the policy reads instead of the row, as ``"next"``.
        prepare: makes rows what the policy reads, ``[rows, ...]``: transforms of torchrl, say, that make numbers of
            frames of bytes.
        trajectories: whether each row is a trajectory, ``[rows, time]``, along which the policy looks.
        in_order: whether rows are steps in order of time, each right after the one before it, but where a trajectory
            begins, as ``"is_init"`` or ``("next", "done")`` say: for ``baseline="previous"``. Of a stretch of rows the
            first one comes after that before it in the source.
        mask_key: truth values, if rows have them: false where a step is padding, whose relevance is zero.
        at_once: how many steps are explained in one pass; by default by what the policy computes of one.
        chunk: how many rows are explained, written and committed together; by default by their size.
        keep: what is written of each row: ``"all"``, a dtype of all, ``"compressed"``,
            :class:`~tdhook.datasets.keeping.Kept`, or ``None`` for nothing.
        reduce: what is made of all rows (:mod:`tdhook.datasets.reducers`).
        checkpoints: weights by name, or files of them, for each of which all rows are explained.
        threads: how many threads of torch a worker computes in. It decides how sums are rounded.
        seed: of what is drawn.
        lease: seconds after which a chunk is taken from a worker on another machine that shows no life.

    Raises:
        FileExistsError: the folder holds something else.
        NotImplementedError: the policy is sharded or offloaded.
        ValueError: it is that of another job: other weights, another method or source; or there are no rows.
    """

    def __init__(
        self,
        method: Attribution,
        policy: nn.Module,
        source: Source,
        out: str | os.PathLike[str],
        *,
        rows: slice | range | Sequence[int] | Tensor | None = None,
        in_keys: InKeys | None = None,
        out_keys: Sequence[NestedKey] | None = None,
        at: NestedKey | None = None,
        prepare: Prepare | None = None,
        trajectories: bool = False,
        in_order: bool = False,
        mask_key: NestedKey | None = ("collector", "mask"),
        at_once: int | None = None,
        chunk: int | None = None,
        keep: Kept | torch.dtype | str | None = "all",
        reduce: Sequence[Reducer] = (),
        checkpoints: Mapping[str, Checkpoint] | None = None,
        threads: int = 1,
        seed: int = 0,
        lease: float = 60.0,
    ) -> None:
        for name, number in (("chunk", chunk), ("threads", threads)):
            if number is not None and number < 1:
                raise ValueError(f"{name} is at least 1, got {name}={number}")
        self.folder = JobFolder(out)
        self.reducers = as_names(reduce)
        self.keep = as_kept(keep)
        if trajectories and in_order:
            raise ValueError("rows are trajectories, or steps in order: not both")
        if self.keep is None and not self.reducers:
            raise ValueError(
                "a job that keeps nothing and reduces nothing has no result: give keep= or reduce="
            )
        self._rows = chosen(as_rows(source), rows)
        if not len(self._rows):
            raise ValueError("the source has no rows to explain")
        if in_order:
            require_in_order(self._rows)
        self.threads, self._lease = threads, lease
        module = policy.model.root if isinstance(policy, ExplainedModule) else unwrapped(policy)
        if is_elsewhere(module):
            raise NotImplementedError(
                "weights of the policy are not all in this process (they are sharded or offloaded), and a job gives "
                "each process rows of its own: load the policy whole, or explain batches by LRP(...).wrap(policy) in "
                "all of its processes"
            )
        explaining = Explaining(
            method,
            module,
            self._rows,
            prepare,
            in_keys,
            out_keys,
            at,
            trajectories,
            in_order,
            mask_key,
            at_once,
            seed,
        )
        self.chunks = Chunks(explaining, dict(checkpoints or {}), self.folder, self.keep, self.reducers)
        with one_way(threads):
            torch.manual_seed(seed)  # layers that are made in the first call are the same for all workers
            self.chunks.load(0)
            explaining.settle()
            first = explaining.piece(0, min(2, len(self._rows)))
        self.chunks.lay_out(first, chunk)
        self.units = self.chunks.units
        self.folder.begin(self._manifest(explaining, _chosen_identity(rows)))

    def work(
        self,
        *,
        place: Place | None = None,
        on_done: Callable[[int], object] | None = None,
        until: Callable[[], bool] | None = None,
    ) -> Status:
        """Explain chunk after chunk until all are done, by whomever.

        Of the threads of a process one explains a chunk at a time, and torch's random numbers are put back afterwards.
        Where the policy draws some, no other thread is to draw meanwhile.

        Args:
            place: where among the workers this one is; by default what the launcher says (torchrun, Slurm, MPI).
            on_done: called with each chunk that this worker has done.
            until: asked before each chunk, whether to stop.

        Returns:
            What there is now.

        Raises:
            OSError: the disk is full, or the folder cannot be written to. What is done stays done.
            ValueError: some rows cannot be explained, and the message says which and why. All others are done.
        """
        place = Place.here() if place is None else place
        with _resumable(self.folder.home):
            if not self.chunks.make_room():
                self._lost(self._changed(), "has lost rows")
            while self._work(place, on_done, until) and (torn := self.folder.torn()):
                self._lost(torn, "has notes of chunks that are no such notes")
        status = self.status()
        if status.finished:
            self.folder.finish_rows()
            ClaimFiles(self.folder.claims, "").sweep()
        return status

    def _work(
        self, place: Place, on_done: Callable[[int], object] | None, until: Callable[[], bool] | None
    ) -> bool:
        """Explain what is left, and whether nothing is."""
        worker = this_worker()
        claims = Claims(ClaimFiles(self.folder.claims, worker.name), worker, self._lease)
        self.folder.note(self.folder.workers / f"{worker.name}.json", {**worker.as_data(), **_machine()})
        turns = Turns([*place.order(self.units)], claims, self.folder, random.Random(worker.name))
        failed: list[Exception] = []
        while (turn := turns.next()) is not None:
            if turn.unit is None:
                if until is not None and until():
                    return False
                time.sleep(turn.pause)
                continue
            error: Exception | None = None
            try:
                if until is not None and until():
                    return False
                with claims.kept_alive(turn.unit), one_way(self.threads):
                    self.chunks.do(turn.unit)
            except OSError:
                raise
            except Exception as raised:  # of these rows: others can be explained
                error = raised
                failed.append(raised)
            finally:
                claims.release(turn.unit)
            turns.ended(turn.unit, given_up=error is not None)
            if error is None and on_done is not None:
                on_done(turn.unit)
        if failed:
            raise failed[0]
        return True

    def _changed(self) -> tuple[int, ...]:
        return tuple(
            unit
            for unit in sorted(self.units.among(self.folder.all_done()))
            if not self.chunks.stored.is_as_written(unit)
        )

    def _lost(self, units: Sequence[int], what: str) -> None:
        """Have chunks explained again, if any are lost."""
        if not units:
            return
        self.folder.reopen(units)
        warnings.warn(
            f"{self.folder.home} {what}: {len(units)} of {len(self.units)} chunks are explained again",
            stacklevel=3,
        )

    def status(self) -> Status:
        """How much is done, and who is at work."""
        return Status.of(self.folder, self.units)

    def result(self, *, partial: bool = False) -> Result:
        """What there is of the job.

        Args:
            partial: whether it may be of those rows alone that are done.

        Raises:
            RuntimeError: not all is done, and ``partial`` was not said.
        """
        return Result.of(self.chunks.stored, partial=partial)

    def verify(self, sample: int | None = None, seed: int = 0, *, mend: bool = False) -> Verified:
        """Look whether what lies on the disk is what was written, and explain some of it again.

        Args:
            sample: how many chunks, drawn by chance, are explained again; by default none is, and only what was written
                is compared with what was noted of it.
            seed: of the draw.
            mend: whether chunks that are not as they were written, or come out otherwise, count as not done from now
                on, so that :meth:`work` explains them again.
        """
        done = sorted(self.units.among(self.folder.all_done()))
        wrong = self._changed()
        again: list[int] = []
        differ: list[int] = []
        if sample:
            chance = torch.Generator().manual_seed(seed)
            drawn = torch.randperm(len(done), generator=chance)[:sample].tolist()
            again = sorted(done[i] for i in drawn)
            for unit in again:
                with one_way(self.threads):
                    differ += [] if self.chunks.same_again(unit) else [unit]
        if mend and (wrong or differ):
            self.folder.reopen({*wrong, *differ})
        return Verified(len(done), wrong, tuple(again), tuple(differ))

    def _manifest(self, told: Explaining, which: Plain) -> dict[str, Plain]:
        return {
            "tdhook": tdhook.__version__,
            "format": _FORMAT,
            "units": {
                "rows": self.units.rows,
                "chunk": self.units.chunk,
                "checkpoints": self.units.checkpoints,
                "piece": self.chunks.piece,
                "at_once": told.recorded.at_once,
            },
            "attribution_key": list(parts_of(told.method.attribution_key)),
            "layout": self.chunks.layout.as_data(),
            "source": {**rows_identity(self._rows), "chosen": which},
            "model": dict(module_identity(told.model)),
            "checkpoints": {**self.chunks.digests()},
            "method": described(told.method),
            "reads": described(
                [told.in_keys, told.out_keys, told.at, told.trajectories, told.in_order, told.mask_key]
            ),
            "prepare": described(told.prepare),
            "keep": described(self.keep),
            "reduce": described(list(self.reducers.values())),
            "seed": told.seed,
            "threads": self.threads,
            "versions": {name: _version(name) for name in ("torch", "tensordict")},
        }


@contextmanager
def _resumable(home: Path) -> Iterator[None]:
    """Have errors of the system say what they mean for the job."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        where = "" if error.filename is None else f" ({error.filename})"
        raise type(error)(
            error.errno,
            f"{error.strerror}{where}: the work on {home} has stopped. What is done stays done; begin again to go on",
        ) from error


def _chosen_identity(rows: slice | range | Sequence[int] | Tensor | None) -> Plain:
    """Which rows were chosen: numbers by their digest."""
    return described(str(rows) if isinstance(rows, slice | range | None) else torch.as_tensor(rows))


def _version(package: str) -> str:
    module = {"torch": torch}.get(package) or __import__(package)
    return str(module.__version__)


def _machine() -> dict[str, Plain]:
    """What of a machine decides how it rounds."""
    found: dict[str, Plain] = {"system": platform.platform(), "python": platform.python_version()}
    with suppress(AttributeError):
        found["kernels"] = torch.backends.cpu.get_cpu_capability()
    return found
