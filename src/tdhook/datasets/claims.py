"""Claims: who is at work on which chunk, so that no two workers do the same.

A claim is a lease: a file that its worker touches while it lives. Whether a worker lives is judged by whether its file
still changes, by the clock of whoever looks: clocks of machines may differ. Of a worker on the same machine the system
knows at once. Nothing rests on claims but time: a chunk that two workers explain is the same bytes.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from tdhook.files import read_json

__all__ = ["Claims", "Worker", "this_worker"]


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
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    return ""


@dataclass
class _Seen:
    """When a claim was last seen to change, by the clock of this process."""

    stamp: tuple[int, str]
    at: float = field(default_factory=time.monotonic)


class Claims:
    """The claims of a job folder, as one worker sees them.

    Args:
        folder: where they lie.
        worker: who claims.
        lease: seconds after which a claim that does not change is taken from its worker.
    """

    def __init__(self, folder: Path, worker: Worker, lease: float) -> None:
        self.folder, self.worker, self.lease = folder, worker, lease
        self._seen: dict[int, _Seen] = {}
        self._known = json.dumps(worker.as_data()).encode()

    def take(self, unit: int) -> bool:
        """Claim a chunk, and whether that was possible. What a worker that is no more had claimed is free."""
        path = self._path(unit)
        for _ in range(2):
            if self._make(path):
                return True
            if not self._stale(unit):
                return False
            self._release(path)
        return False

    def release(self, unit: int) -> None:
        """Let go of a chunk."""
        self._release(self._path(unit))

    @contextmanager
    def kept_alive(self, unit: int) -> Iterator[None]:
        """Show that the worker lives while the block runs."""
        done = threading.Event()

        def touch() -> None:
            while not done.wait(self.lease / 4):
                with suppress(OSError):  # taken away: two do the same then
                    os.utime(self._path(unit))

        thread = threading.Thread(target=touch, name="tdhook-claim", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def held(self) -> dict[int, dict[str, object]]:
        """Who has claimed what, as far as it can be read."""
        found: dict[int, dict[str, object]] = {}
        for path in self.folder.glob("*.claim"):
            told: object = None
            with suppress(OSError, ValueError):
                told = read_json(path)
            found[int(path.stem)] = told if isinstance(told, dict) else {}
        return found

    def is_stale(self, unit: int) -> bool:
        """Whether a chunk is claimed by a worker that is no more, as far as can be told."""
        return self._stale(unit)

    def _path(self, unit: int) -> Path:
        return self.folder / f"{unit:09d}.claim"

    def _make(self, path: Path) -> bool:
        """Make a claim, whole from the first moment on, unless there is one."""
        new = path.with_name(f".{self.worker.name}")
        new.write_bytes(self._known)
        try:
            os.link(new, path)
        except FileExistsError:
            return False
        except OSError:  # a file system without links
            with suppress(FileExistsError):
                handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
                os.write(handle, self._known)
                os.close(handle)
                return True
            return False
        finally:
            new.unlink()
        return True

    def _release(self, path: Path) -> None:
        with suppress(FileNotFoundError):
            path.unlink()

    def _stale(self, unit: int) -> bool:
        path = self._path(unit)
        try:
            stamp = (path.stat().st_mtime_ns, path.read_text())
        except OSError:
            return False  # it was just released: the next look will tell
        with suppress(ValueError):
            told = json.loads(stamp[1])
            if isinstance(told, dict) and told.get("machine") == self.worker.machine:
                process = told.get("process")
                if isinstance(process, int) and _started(process) != told.get("started"):
                    return True
        seen = self._seen.get(unit)
        if seen is None or seen.stamp != stamp:  # it lives, or is seen for the first time
            self._seen[unit] = _Seen(stamp)
            return False
        return time.monotonic() - seen.at > self.lease
