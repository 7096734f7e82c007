"""Claims: who is at work on which chunk, so that no two workers do the same.

A claim is a lease: a file that its worker touches while it lives. Whether a worker lives is judged by whether its file
still changes, by the clock of whoever looks: clocks of machines may differ. Of a worker on the same machine the system
knows at once. Nothing rests on claims but time: a chunk that two workers explain is the same bytes. So a second worker
may claim a chunk beside a slow one.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

__all__ = ["Board", "ClaimFiles", "Claims", "Worker", "is_gone", "this_worker"]

_FIRST, _SECOND = "claim", "second"
_ENDED = ("Z", "X")
"""States of a process that is no more, but that nobody has asked after yet."""


@dataclass(frozen=True)
class Worker:
    """A process at work.

    Attributes:
        name: unlike any other.
        machine: the machine, and what of it the process sees.
        process: its number there.
        started: when it started, by the clock of the system, to tell it from another of the same number.
    """

    name: str
    machine: str
    process: int
    started: str

    def as_data(self) -> dict[str, str | int]:
        """As plain data."""
        return {
            "name": self.name,
            "machine": self.machine,
            "process": self.process,
            "started": self.started,
        }


def this_worker() -> Worker:
    """This process."""
    process = os.getpid()
    return Worker(
        f"{socket.gethostname()}-{process}-{uuid.uuid4().hex[:8]}", _machine(), process, _started(process)
    )


def _machine() -> str:
    """This boot of this machine, and the numbering of processes that is seen here: containers have their own."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _started(process: int) -> str:
    """When a process of this machine started; nothing if there is no such process, or the system does not say."""
    with suppress(OSError, IndexError):
        # The name of the program, in brackets, may hold anything.
        told = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return "" if told[0] in _ENDED else told[19]
    return ""


def is_gone(worker: Worker, claim: str) -> bool:
    """Whether the system of a worker knows that whoever wrote a claim is no more."""
    with suppress(ValueError):
        told = json.loads(claim)
        if isinstance(told, dict) and told.get("machine") == worker.machine:
            process = told.get("process")
            return isinstance(process, int) and _started(process) != told.get("started")
    return False


class Board(Protocol):
    """Where claims are put up: small texts by name, seen by all workers."""

    def put(self, name: str, text: str) -> bool:
        """Put a text up, whole from the first moment on, and whether that was possible: not where there is one."""

    def look(self, name: str) -> tuple[int, str] | None:
        """When a text was touched last, by whatever clock, and what it says; ``None`` if there is none."""

    def touch(self, name: str) -> None:
        """Show that whoever put it up lives."""

    def remove(self, name: str, text: str) -> None:
        """Take a text away, if it says this."""

    def names(self) -> list[str]:
        """The names of all texts."""


class ClaimFiles:
    """A board that is a folder.

    Args:
        folder: where the files lie.
        worker: the name of whoever puts them up.
    """

    def __init__(self, folder: Path, worker: str) -> None:
        self.folder = folder
        self._own = folder / f".{worker}"

    def put(self, name: str, text: str) -> bool:
        path = self.folder / name
        if path.exists():  # which costs less than to try
            return False
        self._own.write_text(text)
        try:
            os.link(self._own, path)
        except FileExistsError:
            return False
        except OSError:  # a file system without links
            with suppress(FileExistsError):
                handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
                os.write(handle, text.encode())
                os.close(handle)
                return True
            return False
        finally:
            self._own.unlink(missing_ok=True)
        return True

    def look(self, name: str) -> tuple[int, str] | None:
        path = self.folder / name
        with suppress(OSError):
            return path.stat().st_mtime_ns, path.read_text()
        return None

    def touch(self, name: str) -> None:
        with suppress(OSError):  # taken away: two do the same then
            os.utime(self.folder / name)

    def remove(self, name: str, text: str) -> None:
        path, aside = self.folder / name, self._own.with_name(f"{self._own.name}.taken")
        with suppress(FileNotFoundError):  # another took it away
            os.rename(path, aside)
            if aside.read_text() != text:  # it is that of another, who was faster
                with suppress(OSError):
                    os.link(aside, path)
            aside.unlink()

    def names(self) -> list[str]:
        return [name for name in os.listdir(self.folder) if not name.startswith(".")]

    def sweep(self) -> None:
        """Remove all that lies there: nothing is left to be claimed."""
        for name in os.listdir(self.folder):
            with suppress(OSError):
                (self.folder / name).unlink()


class Claims:
    """The claims of a job, as one worker sees them.

    Args:
        board: where they are put up.
        worker: who claims.
        lease: seconds after which a claim that does not change is taken from its worker.
        clock: seconds, of this worker alone.
        gone: whether a claim is known to be that of a worker that is no more.
    """

    def __init__(
        self,
        board: Board,
        worker: Worker,
        lease: float,
        clock: Callable[[], float] = time.monotonic,
        gone: Callable[[Worker, str], bool] = is_gone,
    ) -> None:
        self.board, self.worker, self.lease = board, worker, lease
        self._clock, self._gone = clock, gone
        self._text = json.dumps(worker.as_data())
        self._changed: dict[str, tuple[tuple[int, str], float]] = {}
        """Of each claim, what it was like, and when it was first seen like that."""

    def take(self, unit: int, *, second: bool = False) -> bool:
        """Claim a chunk, and whether that was possible. What a worker that is no more had claimed is free.

        Args:
            unit: the chunk.
            second: beside a worker that is at it.
        """
        name = _name(unit, second)
        for _ in range(2):
            if self.board.put(name, self._text):
                return True
            stale = self._stale(name)
            if stale is None:
                return False
            self.board.remove(name, stale)
        return False

    def release(self, unit: int) -> None:
        """Let go of a chunk, if it is this worker's."""
        for name in (_name(unit), _name(unit, second=True)):
            if self._is_mine(name):
                self.board.remove(name, self._text)

    def touch(self, unit: int) -> None:
        """Show that this worker lives."""
        for name in (_name(unit), _name(unit, second=True)):
            if self._is_mine(name):  # and was not taken from it while it slept
                self.board.touch(name)

    @contextmanager
    def kept_alive(self, unit: int) -> Iterator[None]:
        """Show that this worker lives while the block runs."""
        done = threading.Event()

        def touch() -> None:
            while not done.wait(self.lease / 4):
                self.touch(unit)

        thread = threading.Thread(target=touch, name="tdhook-claim", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def held(self) -> set[int]:
        """The chunks that are claimed."""
        parts = (name.partition(".") for name in self.board.names())
        return {int(number) for number, _, kind in parts if kind == _FIRST and number.isdigit()}

    def is_stale(self, unit: int) -> bool:
        """Whether a chunk is claimed by a worker that is no more, as far as can be told."""
        return self._stale(_name(unit)) is not None

    def _is_mine(self, name: str) -> bool:
        there = self.board.look(name)
        return there is not None and there[1] == self._text

    def _stale(self, name: str) -> str | None:
        """What the claim of a worker that is no more says."""
        there = self.board.look(name)
        if there is None:
            return None  # it was just released: the next look will tell
        if self._gone(self.worker, there[1]):
            return there[1]
        now = self._clock()
        before = self._changed.get(name)
        if before is None or before[0] != there:  # it lives, or is seen for the first time
            self._changed[name] = there, now
            return None
        return there[1] if now - before[1] > self.lease else None


def _name(unit: int, second: bool = False) -> str:
    return f"{unit:09d}.{_SECOND if second else _FIRST}"
