"""Launching: many processes of one machine at work on the same job."""

from __future__ import annotations

import math
import multiprocessing
import os
import pickle
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from types import FrameType

from tdhook.datasets.job import Job
from tdhook.datasets.result import Status
from tdhook.datasets.sending import Sent
from tdhook.datasets.units import Place

__all__ = ["cores", "launch"]

_GRACE = 10.0
"""Seconds that workers have to let go of what they hold, when they are told to stop."""
_TERMINATED = 128 + signal.SIGTERM


def cores() -> int:
    """How many cores this process may use, by its affinity and by the quota of its container."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        count = min(count, math.ceil(int(quota) / int(period)))
    return max(1, count)


def launch(
    job: Job,
    workers: int | None = None,
    *,
    place: Place | None = None,
    on_progress: Callable[[Status], object] | None = None,
    every: float = 0.5,
) -> Status:
    """Have many processes of this machine work on a job, and wait until all is done.

    A script that calls this needs ``if __name__ == "__main__":``, as each process reads the script. Rows that are in
    memory are copied once, to where all processes see them; a memory-mapped source is opened by each. If this process
    is interrupted or told to end, so are all others, and what is done stays done; so it does if one of them dies, and
    the others do its chunks.

    Args:
        job: what is explained.
        workers: how many processes; by default as many as this process has cores, for the threads that each takes.
        place: where among several launches this one is; by default what the launcher of this process says.
        on_progress: called with what there is now, again and again, and once at the end.
        every: seconds between two such calls.

    Returns:
        What there is now.

    Raises:
        TypeError: the job cannot be sent to another process.
        RuntimeError: workers have died, and not all is done.
        Exception: what a worker raised; its cause tells where.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"workers is at least 1, got workers={workers}")
    place = Place.here() if place is None else place
    left = _left(job, place)
    if not left:
        return job.work(place=place)
    count = workers or max(1, min(cores() // job.threads, left))
    sent = Sent.of(job)
    team: list[_Member] = []
    with _terminated_as_interrupted():
        try:
            team += (_Member.started(sent, place, i, count) for i in range(count))
            told = 0.0
            while any(member.is_at_work for member in team):
                wait([member.told for member in team if member.is_at_work], timeout=every)
                for member in team:
                    member.listen()
                if on_progress is not None and time.monotonic() - told >= every:
                    on_progress(job.status())
                    told = time.monotonic()
        except BaseException:
            _stop(team)
            raise
    return _outcome(job, place, team, on_progress)


def _left(job: Job, place: Place) -> int:
    done = job.folder.all_done()
    return sum(unit not in done for unit in place.order(job.units))


def _outcome(
    job: Job, place: Place, team: list[_Member], on_progress: Callable[[Status], object] | None
) -> Status:
    for member in team:
        if member.failure is not None:
            member.failure.raised_here(member.title)
    dead = [f"{member.title} {member.end}" for member in team if member.end]
    status = job.status()
    left = _left(job, place)
    if left:
        raise RuntimeError(
            f"{left} chunks are left, as {'; '.join(dead) or 'somebody took the others away'}. What is done stays "
            f"done: begin again, and the work goes on"
        )
    if status.finished:
        job.folder.finish_rows()
    if dead:
        warnings.warn(f"{'; '.join(dead)}: others have done its chunks", stacklevel=3)
    if on_progress is not None:
        on_progress(status)
    return status


@dataclass(frozen=True)
class _Failure:
    """What a worker raised."""

    error: bytes | None
    text: str
    where: str

    @classmethod
    def of(cls, error: Exception) -> _Failure:
        data = None
        with suppress(Exception):  # an error that cannot be sent is told
            data = pickle.dumps(error)
            pickle.loads(data)  # noqa: S301
        return cls(data, f"{type(error).__name__}: {error}", traceback.format_exc())

    def raised_here(self, title: str) -> None:
        error: object = RuntimeError(self.text)
        if self.error is not None:
            error = pickle.loads(self.error)  # noqa: S301 - from a process of ours
        assert isinstance(error, Exception)
        raise error from _Elsewhere(f"in {title}:\n{self.where}")


class _Elsewhere(Exception):
    """Where a worker raised."""


@dataclass
class _Member:
    """A worker, as the process that started it sees it."""

    title: str
    process: SpawnProcess
    told: Connection
    has_begun: bool = False
    failure: _Failure | None = None
    end: str = ""
    is_at_work: bool = True

    @classmethod
    def started(cls, sent: Sent, place: Place, number: int, count: int) -> _Member:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(
            target=_work,
            args=(sent, place.among(number, count), theirs),
            name=f"tdhook-{number}",
            daemon=True,
        )
        process.start()
        theirs.close()
        return cls(f"worker {number} of {count}", process, ours)

    def listen(self) -> None:
        """Hear what the worker says, if it says something."""
        while self.is_at_work and self.told.poll():
            try:
                said: object = self.told.recv()
            except EOFError:
                self.is_at_work = False
                self.process.join()
                self.told.close()
                self.end = self._ended()
                return
            self.has_begun = True
            if isinstance(said, _Failure):
                self.failure = said

    def _ended(self) -> str:
        code = self.process.exitcode or 0
        if code < 0:
            memory = ", as it does where there is no memory left" if code == -signal.SIGKILL else ""
            return f"was ended by {signal.Signals(-code).name}{memory}"
        if code and not self.has_begun:
            return (
                f"ended with code {code} before it began, and said why: a script that launches workers does so "
                'under `if __name__ == "__main__":`'
            )
        return f"ended with code {code}" if code else ""


def _stop(team: list[_Member]) -> None:
    """Tell all workers to end, and see that they do."""
    for member in team:
        member.process.terminate()
    until = time.monotonic() + _GRACE
    for member in team:
        member.process.join(max(0.0, until - time.monotonic()))
        if member.process.is_alive():
            member.process.kill()
            member.process.join()
        member.told.close()


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Have SIGTERM raise, so that workers are stopped before this process ends."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(_TERMINATED)


def _work(sent: Sent, place: Place, told: Connection) -> None:
    """What a worker does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started it is interrupted too, and stops it
    signal.signal(signal.SIGTERM, _leave)
    parent = multiprocessing.parent_process()
    with told:
        told.send("begun")
        try:
            sent.job().work(place=place, until=lambda: parent is not None and not parent.is_alive())
        except Exception as error:
            told.send(_Failure.of(error))
