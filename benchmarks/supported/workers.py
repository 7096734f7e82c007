"""Workers: processes that measure one model after the other, and are replaced where one ends or takes too long."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any

__all__ = ["rows"]

COMMAND = (sys.executable, "-m", "benchmarks.supported.worker")
STARTING = 120.0
"""Seconds that a worker has to say that it is ready."""


class Worker:
    """One process, started when it is first needed."""

    def __init__(self, command: Sequence[str]) -> None:
        self.command = command
        self.process: subprocess.Popen[str] | None = None
        self.answers: queue.Queue[str] = queue.Queue()

    def ask(self, library: str, name: str, seconds: float) -> dict[str, Any]:
        """The row of a model, or why there is none."""
        row = {"library": library, "name": name}
        process = self.process or self._started()
        assert process.stdin is not None
        try:
            process.stdin.write(f"{library} {name}\n")
            process.stdin.flush()
            line = self.answers.get(timeout=seconds)
        except queue.Empty:
            self.end()
            return row | {"error": f"TimeoutError: more than {seconds:g} s"}
        except BrokenPipeError:
            line = ""
        if not line:
            code = process.wait()
            self.end()
            return row | {"error": f"ProcessError: the process ended with {code}"}
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _started(self) -> subprocess.Popen[str]:
        self.process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.answers = queue.Queue()
        self.listening = threading.Thread(target=self._listen, args=(self.process, self.answers), daemon=True)
        self.listening.start()
        self.answers.get(timeout=STARTING)
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
            process, self.process = self.process, None
            assert process.stdin is not None and process.stdout is not None
            process.kill()
            process.wait()
            self.listening.join()
            for pipe in (process.stdin, process.stdout):
                with suppress(BrokenPipeError):
                    pipe.close()


def rows(
    wanted: Iterable[tuple[str, str]], seconds: float, command: Sequence[str] = COMMAND
) -> Iterator[dict[str, Any]]:
    """A row for each library and name, made by one process at a time."""
    worker = Worker(command)
    try:
        for library, name in wanted:
            yield worker.ask(library, name, seconds)
    finally:
        worker.end()
