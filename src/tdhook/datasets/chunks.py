"""Chunks: what a worker does with one: explain it, write what is kept of it, reduce it, and commit it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook.datasets.checkpoints import Checkpoint, tensors_of, weights_of
from tdhook.datasets.explaining import Explaining
from tdhook.datasets.folder import JobFolder
from tdhook.datasets.identity import digest_of
from tdhook.datasets.keeping import Kept
from tdhook.datasets.layout import Layout, checksums
from tdhook.datasets.reducing import Part, Piece, Reducer, add_part
from tdhook.datasets.stored import Stored, named
from tdhook.datasets.units import Units
from tdhook.models.loading import Weights

__all__ = ["Chunks"]

_PIECE = 4 << 20
"""Bytes, read and written, of the rows that are looked at together."""
_SMALLEST, _LARGEST = 16, 1 << 14
_CHUNK = 32 << 20
"""Bytes of a chunk, about: what is worked out for each takes no time beside it."""
_CHUNKS = 1 << 16
"""How many chunks there are at most, unless asked: each is three small files."""


@dataclass
class Chunks:
    """The chunks of a job.

    Attributes:
        explaining: explains rows.
        checkpoints: weights by name, for each of which all rows are explained; none if only those of the model are.
        folder: where it is written.
        keep: what is written of each row.
        reducers: what is made of all rows, by name.
        layout: the entries that are written.
        units: which rows are in which chunk.
        piece: how many rows are looked at together.
    """

    explaining: Explaining
    checkpoints: Mapping[str, Checkpoint]
    folder: JobFolder
    keep: Kept | None
    reducers: Mapping[str, Reducer]
    layout: Layout = field(init=False)
    units: Units = field(init=False)
    piece: int = field(init=False)
    _loaded: int | None = field(default=None, init=False)
    _digests: dict[str, str] = field(default_factory=dict, init=False)

    @property
    def compressed(self) -> bool:
        """Whether rows are written in compressed blocks."""
        return self.keep is not None and self.keep.compressed

    def lay_out(self, first: Piece, chunk: int | None) -> None:
        """Decide what is written, and how many rows go together.

        Args:
            first: some rows, explained.
            chunk: how many rows are asked to be committed together.

        Raises:
            Exception: a reducer cannot reduce them, so that none could be; the message says which.
        """
        self._add({}, first)
        self.layout = Layout({}) if self.keep is None else Layout.of(self.kept(first))
        self.piece = self._rows_of_a_piece(first)
        count = len(self.explaining.rows)
        if chunk is None:
            fewest = max(count / _CHUNKS, _CHUNK * self.piece / _PIECE)
            chunk = math.ceil(fewest / self.piece) * self.piece
        self.piece = min(self.piece, chunk)
        self.units = Units(count, chunk, max(1, len(self.checkpoints)))

    def make_room(self) -> bool:
        """Have room on the disk for all rows that are written, and whether none of those that were is lost.

        Raises:
            OSError: there is none.
        """
        return not self.stored.maps_rows or self.folder.place_rows(self.layout, self.stored.batch)

    def do(self, unit: int) -> None:
        """Explain a chunk, write it, and commit it, unless another worker does so before."""
        first = self.units.checkpoint(unit) * self.units.rows
        crc: dict[NestedKey, int] = {}
        block: list[dict[NestedKey, Tensor]] = []
        parts: dict[str, Part] = {}
        for piece in self._pieces(unit):
            if self.folder.is_done(unit):
                return
            kept = self.kept(piece)
            crc = checksums(kept, crc)
            if self.compressed:
                block.append(kept)
            elif kept:
                self.folder.write_rows(first + int(piece.index[0]), kept)
            self._add(parts, piece)
        if block:
            self.folder.write_block(unit, {key: torch.cat([one[key] for one in block]) for key in block[0]})
        elif crc:
            self.folder.sync_rows(self.layout)
        if parts:
            self.folder.write_part(unit, parts)
        begin, end = self.units.span(unit)
        self.folder.commit(unit, {"rows": [begin, end], "crc32": {**named(crc)}})

    def _add(self, parts: dict[str, Part], piece: Piece) -> None:
        """Add what reducers know of some rows to what they know of those before."""
        for reducer in self.reducers.values():
            add_part(parts, reducer, piece)

    def _pieces(self, unit: int) -> Iterator[Piece]:
        self.load(self.units.checkpoint(unit))
        self.explaining.anew(unit)
        for begin, end in self.units.pieces(unit, self.piece):
            yield self.explaining.piece(begin, end)

    def kept(self, piece: Piece) -> dict[NestedKey, Tensor]:
        """What is written of some rows."""
        if self.keep is None:
            return {}
        inputs = self.explaining.inputs_of(piece.entries)
        return self.keep.of(piece.entries, inputs, self.explaining.axes_of(piece.data, piece.entries))

    def load(self, checkpoint: int) -> None:
        """Explain with the weights of a checkpoint from now on.

        Raises:
            ValueError: they are others than when the job was made, as those of a file that was written since.
        """
        if not self.checkpoints or self._loaded == checkpoint:
            return
        self._loaded = None
        self.explaining.load(self._weights(list(self.checkpoints)[checkpoint]))
        self._loaded = checkpoint

    def _weights(self, name: str) -> Weights:
        found = weights_of(self.checkpoints[name])
        digest = digest_of(tensors_of(found))
        if self._digests.setdefault(name, digest) != digest:
            raise ValueError(
                f"the checkpoint {name!r} has other weights than when the job was made: give it those of then, in a "
                "file or a copy that nothing is written to"
            )
        return found

    def digests(self) -> dict[str, str]:
        """The digests of the weights of all checkpoints, by name."""
        for name in self.checkpoints:
            if name not in self._digests:
                self._weights(name)
        return {name: self._digests[name] for name in self.checkpoints}

    @property
    def stored(self) -> Stored:
        """What is written, and where."""
        return Stored(
            self.folder,
            self.units,
            self.piece,
            self.layout,
            self.keep is not None,
            self.compressed,
            tuple(self.checkpoints),
            self.reducers,
            self.explaining.method.attribution_key,
        )

    def same_again(self, unit: int) -> bool:
        """Whether a chunk comes out as it did, explained again."""
        crc: dict[NestedKey, int] = {}
        parts: dict[str, Part] = {}
        for piece in self._pieces(unit):
            crc = checksums(self.kept(piece), crc)
            self._add(parts, piece)
        try:
            there, told = (self.folder.read_part(unit) if parts else {}), self.folder.told_of(unit)
        except (ValueError, FileNotFoundError):  # cut off, or gone
            return False
        same = all(
            digest_of(part[what] for what in sorted(part))
            == digest_of(there[name][what] for what in sorted(part))
            for name, part in parts.items()
        )
        return same and named(crc) == told["crc32"]

    def _rows_of_a_piece(self, first: Piece) -> int:
        """How many rows are read, explained and written together: a multiple of those that one pass takes."""
        rows = len(first.index)
        found = sum(x.numel() * x.element_size() for x in first.entries.values())
        keys = self.explaining.recorded.reads(first.data)
        read = sum(x.numel() * x.element_size() for x in map(first.data.get, keys) if isinstance(x, Tensor))
        fitting = _PIECE * rows // max(1, found + read)
        at_once = self.explaining.recorded.at_once or 1
        steps: int = max(1, first.data.batch_size[1:].numel())
        together = max(1, at_once // steps)
        wanted = max(together, min(max(fitting, _SMALLEST), _LARGEST))
        return wanted // together * together
