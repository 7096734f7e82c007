"""Workers: processes that measure one model after the other, and are replaced where one ends or takes too long."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from typing import Any

__all__ = ["rows"]

STARTING = 120.0
"""Seconds that a worker has to start in, besides."""


class Worker:
    """One process, started when it is first needed."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None
        self.answers: queue.Queue[str] = queue.Queue()

    def ask(self, library: str, name: str, seconds: float) -> dict[str, Any]:
        """The row of a model, or why there is none."""
        row = {"library": library, "name": name}
        fresh = self.process is None
        process = self.process or self._started()
        assert process.stdin is not None
        try:
            process.stdin.write(f"{library} {name}\n")
            process.stdin.flush()
            line = self.answers.get(timeout=seconds + fresh * STARTING)
        except queue.Empty:
            self.end()
            return row | {"error": f"TimeoutError: more than {seconds:.0f} s"}
        except BrokenPipeError:
            line = ""
        if not line:
            self.end()
            return row | {"error": f"ProcessError: the process ended with {process.wait()}"}
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _started(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "benchmarks.supported.worker"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # noqa: S603
        self.answers = queue.Queue()
        threading.Thread(target=self._listen, args=(self.process, self.answers), daemon=True).start()
        return self.process

    @staticmethod
    def _listen(process: subprocess.Popen[str], answers: queue.Queue[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            answers.put(line)
        answers.put("")

    def end(self) -> None:
        """Stop the process, whatever it does."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


def rows(wanted: Iterable[tuple[str, str]], seconds: float) -> Iterator[dict[str, Any]]:
    """A row for each library and name, made by one process at a time."""
    worker = Worker()
    try:
        for library, name in wanted:
            yield worker.ask(library, name, seconds)
    finally:
        worker.end()
