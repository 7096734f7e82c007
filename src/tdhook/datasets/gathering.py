"""Gathering: what machines without a common file system have done of the same job, brought together."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from tensordict.utils import NestedKey
from torch import Tensor

from tdhook.datasets.folder import JobFolder
from tdhook.datasets.identity import Plain, difference
from tdhook.datasets.layout import checksums
from tdhook.datasets.stored import Stored, named, stored_in

__all__ = ["Gathered", "gather"]


@dataclass(frozen=True)
class Gathered:
    """What :func:`gather` found.

    Attributes:
        brought: how many chunks it brought.
        done: how many are there now.
        chunks: how many there are in all.
        changed: those whose bytes are not those that were written, by folder: they were left where they are.
    """

    brought: int
    done: int
    chunks: int
    changed: dict[str, tuple[int, ...]]

    @property
    def finished(self) -> bool:
        """Whether all is there."""
        return self.done == self.chunks


def gather(folders: Sequence[str | os.PathLike[str]], into: str | os.PathLike[str]) -> Gathered:
    """Bring the chunks of several folders of the same job into one, which then is as if all had been done there.

    Each chunk is compared with its checksum, written, and committed as a worker does it. What is there already is left,
    so that it can be called again, after an interruption or when more is done. What was typed to begin the job is that
    of the first folder that knows it.

    Args:
        folders: job folders, of workers at a ``Place(rank, world, alone=True)``, say.
        into: the job folder; made if missing.

    Raises:
        FileNotFoundError: one is no job folder.
        FileExistsError: ``into`` holds something else.
        ValueError: they are not of the same job; the message names what differs. Or there are none.
    """
    sources = [_Source(JobFolder(folder)) for folder in folders]
    if not sources:
        raise ValueError("there are no folders to gather from")
    first = sources[0]
    for other in sources[1:]:
        found = difference(other.manifest, first.manifest)
        if found is not None:
            raise ValueError(
                f"{other.folder.home} and {first.folder.home} are folders of different jobs, which differ in {found}"
            )
    target = JobFolder(into)
    target.begin(first.manifest)
    for source in sources:
        target.bring_words(source.folder)
    units = first.stored.units
    there = units.among(target.all_done())
    brought, changed = 0, {}
    for source in sources:
        wrong = []
        for unit in sorted(units.among(source.folder.all_done()) - there):
            if source.bring(unit, target):
                there.add(unit)
                brought += 1
            else:
                wrong.append(unit)
        if wrong:
            changed[str(source.folder.home)] = tuple(wrong)
    changed = {home: tuple(sorted(set(wrong) - there)) for home, wrong in changed.items()}
    if len(there) == len(units):
        target.finish_rows()
    return Gathered(
        brought,
        len(there),
        len(units),
        {home: wrong for home, wrong in changed.items() if wrong},
    )


@dataclass
class _Source:
    """A folder that is gathered from."""

    folder: JobFolder

    @cached_property
    def manifest(self) -> dict[str, Plain]:
        return self.folder.told()

    @cached_property
    def stored(self) -> Stored:
        return stored_in(self.folder)

    def bring(self, unit: int, target: JobFolder) -> bool:
        """Bring a chunk, and whether it is as it was written."""
        begin, end = self.stored.units.span(unit)
        first = self.stored.units.checkpoint(unit) * self.stored.units.rows + begin
        part, block = self.folder.parts / f"{unit:09d}.npz", self.folder.blocks / f"{unit:09d}.z"
        found: dict[NestedKey, Tensor] = {}
        try:
            told = self.folder.told_of(unit)
            if self.stored.reducers:
                self.folder.read_part(unit)
            if block.is_file():
                found = self.folder.read_block(unit, end - begin, self.stored.layout)
            elif self.stored.layout.entries:
                found = self.folder.read_rows(first, end - begin, self.stored.layout)
            crc = named(checksums(found))
        except (ValueError, FileNotFoundError):  # cut off, or gone
            return False
        if crc != told["crc32"]:
            return False
        for path in (part, block):
            if path.is_file():
                target.bring(path)
        if found and not block.is_file():
            target.place_rows(self.stored.layout, self.stored.batch)
            target.write_rows(first, found)
            target.sync_rows(self.stored.layout)
        target.commit(unit, told)
        return True
