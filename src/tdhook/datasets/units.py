"""Units: what is explained by one worker at a time, and in which order a worker looks for them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace

__all__ = ["Place", "Units"]


@dataclass(frozen=True)
class Units:
    """Chunks of rows, for each checkpoint.

    Attributes:
        rows: how many rows there are.
        chunk: how many of them are explained, written and committed together.
        checkpoints: how many there are.
    """

    rows: int
    chunk: int
    checkpoints: int = 1

    @property
    def chunks(self) -> int:
        """How many chunks the rows have."""
        return -(-self.rows // self.chunk)

    def __len__(self) -> int:
        return self.chunks * self.checkpoints

    def among(self, numbers: Iterable[int]) -> set[int]:
        """Those of some numbers that are units."""
        return {number for number in numbers if 0 <= number < len(self)}

    def checkpoint(self, unit: int) -> int:
        """The checkpoint of a unit."""
        return unit // self.chunks

    def span(self, unit: int) -> tuple[int, int]:
        """The first row of a unit, and that after its last."""
        begin = unit % self.chunks * self.chunk
        return begin, min(begin + self.chunk, self.rows)

    def pieces(self, unit: int, piece: int) -> Iterator[tuple[int, int]]:
        """The stretches of a unit that are read together."""
        begin, end = self.span(unit)
        for first in range(begin, end, piece):
            yield first, min(first + piece, end)


@dataclass(frozen=True)
class Place:
    """Where among the workers of one launch a worker is: it begins there, so that workers seldom meet.

    Attributes:
        rank: its number.
        world: how many there are.
        alone: whether it sees to its own part only, the ``rank``-th of ``world``: others write to other folders.
        start: where in its part it begins, as a fraction of it.
    """

    rank: int = 0
    world: int = 1
    alone: bool = False
    start: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world:
            raise ValueError(f"a place is the rank-th of world, from 0 on: got {self.rank} of {self.world}")

    @classmethod
    def here(cls, environment: Mapping[str, str] | None = None) -> Place:
        """What the launcher of this process says: torchrun, a Slurm array, tasks of Slurm or MPI; else it is alone."""
        given = os.environ if environment is None else environment
        for rank, world, first in _LAUNCHERS:
            with suppress(KeyError, ValueError):
                return cls(int(given[rank]) - int(given.get(first, "0")), int(given[world]))
        return cls()

    def among(self, worker: int, workers: int) -> Place:
        """The place of one of several workers that share this place."""
        if self.alone:
            return replace(self, start=worker / workers)
        return Place(self.rank * workers + worker, self.world * workers)

    def order(self, units: Units) -> Iterator[int]:
        """All units that a worker here sees to, from that where it begins on, and around."""
        count = len(units)
        begin, end = (count * place // self.world for place in (self.rank, self.rank + 1))
        here = range(begin, end) if self.alone else range(begin, begin + count)
        first = int(len(here) * self.start)
        for i in range(len(here)):
            yield here[(first + i) % len(here)] % count


_LAUNCHERS = (
    ("RANK", "WORLD_SIZE", ""),
    ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN"),
    ("SLURM_PROCID", "SLURM_NTASKS", ""),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", ""),
)
"""Variables that say which of how many, and the number of the first."""
