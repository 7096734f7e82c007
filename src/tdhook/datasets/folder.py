"""The job folder: what lies where, written so that nothing is ever half there.

``manifest.json`` says what is explained and how. ``rows/`` is the explained data set, and is called ``rows.part`` until
all of it is there, so that nobody takes a row that was not explained for one whose relevance is zero. ``blocks/`` is
there instead where rows are compressed. ``done/`` has a file for each chunk that is on disk, ``parts/`` what reducers
know of it, ``claims/`` who is at work on which, ``workers/`` who has been.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import uuid
import zlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import torch
from tensordict import TensorDict
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook.datasets.identity import Plain, difference
from tdhook.datasets.reducing import Part
from tdhook.files import read_json
from tdhook.keys import parts_of

__all__ = ["JobFolder", "Layout", "checksums"]

_TEMPORARY = ".writing-"


class Layout:
    """The entries of an explained data set.

    Attributes:
        entries: shape of a row and dtype, by key.
    """

    def __init__(self, entries: Mapping[NestedKey, tuple[torch.Size, torch.dtype]]) -> None:
        self.entries = dict(entries)

    @classmethod
    def of(cls, found: Mapping[NestedKey, Tensor]) -> Layout:
        """The layout of some rows, ``[rows, ...]`` by key."""
        return cls({key: (value.shape[1:], value.dtype) for key, value in found.items()})

    @property
    def row_bytes(self) -> int:
        """How many bytes a row takes."""
        return sum(shape.numel() * dtype.itemsize for shape, dtype in self.entries.values())

    def as_data(self) -> dict[str, Plain]:
        """As plain data."""
        return {_name(key): [str(dtype), *shape] for key, (shape, dtype) in self.entries.items()}


def _name(key: NestedKey) -> str:
    return ".".join(parts_of(key))


class JobFolder:
    """A job folder.

    Args:
        home: where it is; made if missing.
    """

    def __init__(self, home: str | os.PathLike[str]) -> None:
        self.home = Path(home)
        self.manifest, self.rows, self.unfinished = (
            self.home / name for name in ("manifest.json", "rows", "rows.part")
        )
        self.done, self.parts, self.claims, self.blocks, self.workers = (
            self.home / name for name in ("done", "parts", "claims", "blocks", "workers")
        )

    def begin(self, manifest: Mapping[str, Plain]) -> None:
        """Make the folder for a job, or find that it is that of the same job.

        Raises:
            FileExistsError: it holds something else.
            ValueError: it is that of another job; the message names what differs.
        """
        if not self.manifest.is_file():
            there = self.home.is_dir() and any(
                not name.startswith(_TEMPORARY) and name not in self._names for name in os.listdir(self.home)
            )
            if there:
                raise FileExistsError(
                    f"{self.home} holds something else than a job of tdhook: choose another folder"
                )
            for folder in (self.done, self.parts, self.claims, self.workers):
                folder.mkdir(parents=True, exist_ok=True)
            new = self._temporary()
            self._write(new, (json.dumps(manifest, indent=2, allow_nan=False) + "\n").encode())
            with suppress(FileExistsError):  # another worker was first
                os.link(new, self.manifest)
            new.unlink()
        found = difference(json.loads(json.dumps(manifest)), self.told())
        if found is not None:
            raise ValueError(
                f"{self.home} is the folder of another job, which differs in {found}: give that, or another folder"
            )

    @property
    def _names(self) -> set[str]:
        folders = (self.rows, self.unfinished, self.done, self.parts, self.claims, self.blocks, self.workers)
        return {path.name for path in folders}

    def told(self) -> dict[str, Plain]:
        """What the manifest says.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is no manifest of a job.
        """
        if not self.manifest.is_file():
            raise FileNotFoundError(f"{self.home} is no job folder of tdhook: it has no manifest.json")
        found = read_json(self.manifest)
        if not isinstance(found, dict) or "units" not in found:
            raise ValueError(f"{self.manifest} is no manifest of a job")
        return found

    def place_rows(self, layout: Layout, batch: tuple[int, ...]) -> Path:
        """The memory-mapped rows, ``[*batch, ...]``: made if nobody has, with room for all of them.

        Raises:
            OSError: there is no room on the disk.
        """
        for there in (self.rows, self.unfinished):
            if there.is_dir():
                return there
        size = layout.row_bytes * int(np.prod(batch, dtype=np.int64))
        free = shutil.disk_usage(self.home).free
        if size > free:
            raise OSError(
                f"the rows of this job take {size / 2**30:.1f} GiB, and the disk of {self.home} has "
                f"{free / 2**30:.1f}: keep less, keep=Kept(...) or keep=None, or write elsewhere"
            )
        new = self._temporary()
        empty = TensorDict({}, batch_size=batch)
        for key, (shape, dtype) in layout.entries.items():
            empty.set(key, torch.zeros((), dtype=dtype).expand((*batch, *shape)))
        empty.memmap_like(new)
        with suppress(OSError):  # another worker was first
            os.rename(new, self.unfinished)
        shutil.rmtree(new, ignore_errors=True)
        return self.place_rows(layout, batch)

    def write_rows(self, first: int, found: Mapping[NestedKey, Tensor]) -> None:
        """Write rows at their place, and wait until they are on the disk.

        Args:
            first: where the first of them is, counted over all axes of the batch.
            found: ``[rows, ...]`` by key.
        """
        for key, value in found.items():
            with self._opened(key, os.O_WRONLY) as handle:
                data = memoryview(_bytes(value))
                at = first * (len(data) // max(1, len(value)))
                while data:
                    count = os.pwrite(handle, data, at)
                    data, at = data[count:], at + count

    def read_rows(self, first: int, count: int, layout: Layout) -> dict[NestedKey, Tensor]:
        """Rows as they are on the disk, ``[count, ...]`` by key."""
        found: dict[NestedKey, Tensor] = {}
        for key, (shape, dtype) in layout.entries.items():
            size = shape.numel() * dtype.itemsize
            with self._opened(key, os.O_RDONLY) as handle:
                data = bytearray(os.pread(handle, count * size, first * size))
            if len(data) < count * size:
                raise ValueError(f"{self.home} has been cut off: {key!r} ends before row {first + count}")
            value = torch.frombuffer(data, dtype=torch.uint8) if data else torch.zeros(0, dtype=torch.uint8)
            found[key] = value.view(dtype).reshape(count, *shape)
        return found

    def sync_rows(self, layout: Layout) -> None:
        """Wait until what was written of rows is on the disk."""
        for key in layout.entries:
            with self._opened(key, os.O_WRONLY) as handle:
                os.fsync(handle)

    def finish_rows(self) -> None:
        """Give the rows their name, as all of them are there."""
        with suppress(FileNotFoundError, OSError):
            if not self.rows.is_dir():
                os.rename(self.unfinished, self.rows)
        for left in self.home.glob(f"{_TEMPORARY}*"):
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)

    def write_part(self, unit: int, parts: Mapping[str, Part]) -> None:
        """Write what reducers know of a chunk."""
        arrays = {
            f"{name}/{what}": value.numpy() for name, part in parts.items() for what, value in part.items()
        }
        buffer = io.BytesIO()
        np.savez_compressed(buffer, allow_pickle=False, **arrays)
        self._put(self.parts / f"{unit:09d}.npz", buffer.getvalue())

    def read_part(self, unit: int) -> dict[str, Part]:
        """What reducers know of a chunk."""
        found: dict[str, Part] = {}
        with np.load(self.parts / f"{unit:09d}.npz", allow_pickle=False) as arrays:
            for entry in arrays.files:
                name, _, what = entry.rpartition("/")
                found.setdefault(name, {})[what] = torch.from_numpy(arrays[entry])
        return found

    def write_block(self, unit: int, found: Mapping[NestedKey, Tensor]) -> None:
        """Write the rows of a chunk as a compressed block: a bit for each value that is not zero, and those values."""
        self.blocks.mkdir(exist_ok=True)
        parts = []
        for value in found.values():
            raw = np.frombuffer(_bytes(value), dtype=f"u{value.element_size()}")
            there = raw != 0  # a negative zero is not lost
            parts += [np.packbits(there).tobytes(), raw[there].tobytes()]
        sizes = np.array([len(part) for part in parts], dtype=np.int64).tobytes()
        self._put(self.blocks / f"{unit:09d}.z", zlib.compress(sizes + b"".join(parts), 1))

    def read_block(self, unit: int, count: int, layout: Layout) -> dict[NestedKey, Tensor]:
        """The rows of a compressed block, ``[count, ...]`` by key."""
        data = zlib.decompress((self.blocks / f"{unit:09d}.z").read_bytes())
        entries = len(layout.entries)
        sizes = np.frombuffer(data, dtype=np.int64, count=2 * entries)
        ends = np.cumsum([8 * len(sizes), *sizes]).tolist()
        pieces = [data[begin:end] for begin, end in pairwise(ends)]
        found: dict[NestedKey, Tensor] = {}
        for i, (key, (shape, dtype)) in enumerate(layout.entries.items()):
            number = count * shape.numel()
            there = np.unpackbits(np.frombuffer(pieces[2 * i], dtype=np.uint8), count=number).astype(bool)
            raw = np.zeros(number, dtype=f"u{dtype.itemsize}")
            raw[there] = np.frombuffer(pieces[2 * i + 1], dtype=raw.dtype)
            found[key] = torch.from_numpy(raw.view(np.uint8)).view(dtype).reshape(count, *shape)
        return found

    def commit(self, unit: int, told: Mapping[str, Plain]) -> None:
        """Say that all of a chunk is on the disk."""
        self._put(self.done / f"{unit:09d}.json", json.dumps(told).encode())

    def is_done(self, unit: int) -> bool:
        """Whether all of a chunk is on the disk."""
        return (self.done / f"{unit:09d}.json").exists()

    def all_done(self) -> set[int]:
        """The chunks that are on the disk."""
        if not self.done.is_dir():
            return set()
        return {int(name[:9]) for name in os.listdir(self.done) if name.endswith(".json") and name[0] != "."}

    def told_of(self, unit: int) -> dict[str, Plain]:
        """What was said when a chunk was committed."""
        found = read_json(self.done / f"{unit:09d}.json")
        if not isinstance(found, dict):
            raise ValueError(f"{self.done / f'{unit:09d}.json'} is not as it was written")
        return found

    def times(self, units: Iterable[int], most: int) -> list[tuple[int, float]]:
        """When the last chunks were committed, the latest last."""
        found = []
        for unit in units:
            with suppress(FileNotFoundError):
                found.append((unit, (self.done / f"{unit:09d}.json").stat().st_mtime))
        return sorted(found, key=lambda one: one[1])[-most:]

    def note(self, path: Path, told: Mapping[str, Plain]) -> None:
        """Write a small file, whole."""
        self._put(path, (json.dumps(told) + "\n").encode())

    def _opened(self, key: NestedKey, how: int) -> _Handle:
        *above, name = parts_of(key)
        # The rows may get their name at any moment.
        for home in (self.unfinished, self.rows, self.unfinished):
            folder = home.joinpath(*above)
            with suppress(FileNotFoundError):
                # Names of files are quoted keys; versions of tensordict differ in what they quote.
                files = {unquote(path): path for path in os.listdir(folder)}
                return _Handle(os.open(folder / files.get(f"{name}.memmap", f"{name}.memmap"), how))
        raise FileNotFoundError(f"{self.home} has no rows of {key!r}: somebody took them away")

    def _temporary(self) -> Path:
        return self.home / f"{_TEMPORARY}{uuid.uuid4().hex}"

    def _put(self, path: Path, data: bytes) -> None:
        """A file, whole or not at all."""
        new = self._temporary()
        try:
            self._write(new, data)
            os.replace(new, path)
        except BaseException:
            new.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)

    def _write(self, path: Path, data: bytes) -> None:
        with open(path, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())


class _Handle:
    """A file that is open."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __enter__(self) -> int:
        return self._number

    def __exit__(self, *exception: object) -> None:
        os.close(self._number)


def _bytes(value: Tensor) -> memoryview:
    dense = value.detach().cpu().contiguous()
    return dense.reshape(-1).view(torch.uint8).numpy().data if dense.numel() else memoryview(b"")


def _sync_folder(folder: Path) -> None:
    with suppress(OSError):  # a system without
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def checksums(
    entries: Mapping[NestedKey, Tensor], so_far: Mapping[NestedKey, int] | None = None
) -> dict[NestedKey, int]:
    """The CRC-32 of rows, by key; that of more rows goes on from that of those before."""
    return {key: zlib.crc32(_bytes(value), (so_far or {}).get(key, 0)) for key, value in entries.items()}
