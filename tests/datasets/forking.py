"""Processes that share what is loaded, and that end, or sleep, just before they do something to a folder."""

from __future__ import annotations

import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any

MOMENTS = {
    "open",
    "os.rename",
    "os.link",
    "os.remove",
    "os.mkdir",
    "os.utime",
    "os.truncate",
    "shutil.rmtree",
}


def forked(work: Callable[[], object]) -> int:
    """The number of a process that does it, and then ends with code 0."""
    sys.stdout.flush()
    sys.stderr.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of processes that have threads
        process = os.fork()
    if process:
        return process
    try:
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        sys.stderr.flush()
        os._exit(code)


def ended(process: int) -> int:
    """The exit code of a process, or minus the signal that ended it, once it has ended."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def stops_at(moment: int, home: str, number: int) -> None:
    """Have this process get a signal just before the so manieth thing that it does to a folder."""
    seen = 0

    def count(what: str = "", where: tuple[object, ...] = ()) -> None:
        nonlocal seen
        if what and (what not in MOMENTS or not any(home in str(one) for one in where)):
            return
        seen += 1
        if seen == moment:
            os.kill(os.getpid(), number)

    sys.addaudithook(count)
    for name in ("pwrite", "fsync", "ftruncate", "utime"):
        setattr(os, name, _before(getattr(os, name), count))


def _before(function: Callable[..., Any], first: Callable[[], None]) -> Callable[..., Any]:
    def both(*args: Any, **kwargs: Any) -> Any:
        first()
        return function(*args, **kwargs)

    return both


def killed(moment: int, home: str) -> None:
    """``kill -9`` at a moment."""
    stops_at(moment, home, signal.SIGKILL)


def put_to_sleep(moment: int, home: str) -> None:
    """Have this process sleep at a moment, until it is woken."""
    stops_at(moment, home, signal.SIGSTOP)
