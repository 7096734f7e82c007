"""Turns: which chunk a worker explains next, so that workers seldom meet and none waits long for a slow one."""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from tdhook.datasets.claims import Claims

__all__ = ["Done", "Turn", "Turns"]

_SHORTEST, _LONGEST = 0.02, 2.0
"""Seconds between two looks of a worker that has nothing to do."""
_WATCHED = 8
"""How many chunks of others such a worker watches."""
_PATIENCE = 2.0
"""How many times as long as this worker's slowest chunk another may take before this one explains the same."""
_LEAST_PATIENCE = 0.5


class Done(Protocol):
    """Which chunks are done, as all workers see it."""

    def is_done(self, unit: int) -> bool:
        """Whether one is."""

    def all_done(self) -> set[int]:
        """Those that are."""


@dataclass(frozen=True)
class Turn:
    """What a worker does next.

    Attributes:
        unit: the chunk that it explains, which is claimed; ``None`` if there is none for it now.
        pause: seconds until it may look again.
    """

    unit: int | None
    pause: float = 0.0


class Turns:
    """What one worker does, turn by turn.

    It goes through its chunks in order while nobody is in its way. Where another is, it looks which chunks are free,
    and goes on at one of them by chance. Where none is free, it watches some of those that others are at: it takes over
    those of workers that are no more, and explains beside a worker what that one takes very long for.

    Args:
        order: the chunks that this worker sees to, in its order.
        claims: who is at work on which.
        done: which are done.
        chance: where it goes on.
        clock: seconds.
    """

    def __init__(
        self,
        order: Sequence[int],
        claims: Claims,
        done: Done,
        chance: random.Random,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._claims, self._done, self._chance, self._clock = claims, done, chance, clock
        there = done.all_done()
        self._order = [unit for unit in order if unit not in there]
        self._ahead = deque(self._order)
        self._watched: list[int] = []
        self._met: dict[int, float] = {}
        """When a chunk was first seen to be at work elsewhere."""
        self._given_up: set[int] = set()
        self._pause, self._slowest, self._began = _SHORTEST, 0.0, 0.0

    def next(self) -> Turn | None:
        """What comes next; ``None`` if all chunks are done."""
        unit = self._free()
        if unit is None:
            self._watched = [one for one in self._watched if self._is_left(one)]
            if not self._watched:
                self._look()
                unit = self._free()
                self._watched = self._chance.sample([*self._met], min(len(self._met), _WATCHED))
        if unit is None:
            unit = self._of_others()
        if unit is not None:
            self._pause, self._began = _SHORTEST, self._clock()
            return Turn(unit)
        if not self._order:
            return None
        self._pause = min(2 * self._pause, max(_SHORTEST, min(_LONGEST, self._slowest / 4 or _LONGEST)))
        return Turn(None, self._pause)

    def ended(self, unit: int, *, given_up: bool = False) -> None:
        """Say that a chunk is explained, or cannot be."""
        self._slowest = max(self._slowest, self._clock() - self._began)
        if given_up:
            self._given_up.add(unit)

    def _is_left(self, unit: int) -> bool:
        return unit not in self._given_up and not self._done.is_done(unit)

    def _free(self) -> int | None:
        """The next chunk ahead that nobody has done and nobody is at."""
        looked = False
        while self._ahead:
            unit = self._ahead.popleft()
            if not self._is_left(unit):
                continue
            if self._took(unit):
                return unit
            if not looked:
                self._look()
                looked = True
        return None

    def _took(self, unit: int, *, second: bool = False) -> bool:
        if not self._claims.take(unit, second=second):
            return False
        if self._done.is_done(unit):  # just before
            self._claims.release(unit)
            return False
        return True

    def _look(self) -> None:
        """See which chunks are left, and which of them are free."""
        there, held = self._done.all_done(), self._claims.held()
        self._order = [unit for unit in self._order if unit not in there and unit not in self._given_up]
        free = [unit for unit in self._order if unit not in held]
        begin = self._chance.randrange(len(free)) if free else 0
        self._ahead = deque(free[begin:] + free[:begin])
        now = self._clock()
        self._met = {unit: self._met.get(unit, now) for unit in self._order if unit in held}

    def _of_others(self) -> int | None:
        """A chunk that another is at who is no more, or is slow."""
        lease = self._claims.lease
        patience = max(_LEAST_PATIENCE, min(lease, _PATIENCE * self._slowest or lease))
        now = self._clock()
        for unit in self._watched:
            slow = now - self._met.get(unit, now) > patience
            if self._took(unit) or (slow and self._took(unit, second=True)):
                return unit
        return None
