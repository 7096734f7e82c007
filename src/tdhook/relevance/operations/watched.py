"""Watched passes: what is entered around one forward pass in sight of what watches it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

from tdhook.relevance.operations.stand_ins import Watch, standing_in
from tdhook.tape.overwriting import Memory, Outdated

__all__ = ["Pass"]


class Watcher(Watch, Protocol):
    """A mode that watches passes."""

    outdated: Outdated
    detached: Memory
    uncounted: Memory

    def __enter__(self) -> object:
        """Begin to see torch functions."""

    def __exit__(self, *exception: object) -> None:
        """See them no longer."""

    def look_for_kept(self) -> None:
        """See whether a module keeps what should have been overwritten."""


class Pass(AbstractContextManager[None]):
    """One forward pass.

    Args:
        watcher: what watches it.
    """

    __slots__ = ("_standing_in", "_watcher")

    def __init__(self, watcher: Watcher) -> None:
        self._watcher, self._standing_in = watcher, standing_in(watcher)

    def __enter__(self) -> None:
        if self._watcher.outdated.any:
            self._watcher.outdated.clear()
        for memory in (self._watcher.detached, self._watcher.uncounted):
            if memory:
                memory.clear()
        self._standing_in.__enter__()
        self._watcher.__enter__()

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            self._watcher.__exit__()
        finally:
            self._standing_in.__exit__(None, None, None)
        if error is None and self._watcher.outdated.any:
            self._watcher.look_for_kept()
