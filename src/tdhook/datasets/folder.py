"""The job folder: what lies where, written so that nothing is ever half there.

``manifest.json`` says what is explained and how. ``rows/`` is the explained data set, and is called ``rows.part`` until
all of it is there, so that nobody takes a row that was not explained for one whose relevance is zero. ``blocks/`` is
there instead where rows are compressed. ``done/`` has a file for each chunk that is on disk, ``parts/`` what reducers
know of it, ``claims/`` who is at work on which, ``workers/`` who has been. ``words.json`` is what was typed to begin
the job, if it was typed.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import uuid
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import torch
from tensordict import TensorDict
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook.datasets.identity import Plain, bytes_of, difference
from tdhook.datasets.layout import Layout, packed, unpacked
from tdhook.datasets.reducing import Part
from tdhook.files import read_json, require_text
from tdhook.keys import parts_of

__all__ = ["JobFolder"]

_TEMPORARY = ".writing-"
_CUT_OFF = (FileNotFoundError, ValueError, EOFError, zlib.error, zipfile.BadZipFile)
_MEND = "verify(mend=True) has work() explain it again"
_TIMES = 8
"""How often a file is written anew that others sweep away."""


class JobFolder:
    """A job folder.

    Args:
        home: where it is; made if missing.
    """

    def __init__(self, home: str | os.PathLike[str]) -> None:
        self.home = Path(home)
        self.manifest, self.words, self.rows, self.unfinished = (
            self.home / name for name in ("manifest.json", "words.json", "rows", "rows.part")
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
        require_text(self.home)
        if not self.manifest.is_file():
            # Once more the manifest: another worker may have begun meanwhile, and what lies here be its.
            if self._holds_something_else() and not self.manifest.is_file():
                raise FileExistsError(
                    f"{self.home} holds something else than a job of tdhook (no manifest.json): choose another folder"
                )
            for folder in self._folders:
                folder.mkdir(parents=True, exist_ok=True)
            new = self._temporary()
            self._write(new, (json.dumps(manifest, indent=2, allow_nan=False) + "\n").encode())
            # Another worker was first, or has even done all and swept this away.
            with suppress(FileExistsError, FileNotFoundError):
                os.link(new, self.manifest)
            new.unlink(missing_ok=True)
        found = difference(json.loads(json.dumps(manifest)), self.told())
        if found is not None:
            raise ValueError(
                f"{self.home} is the folder of another job, which differs in {found}: give that, or another folder"
            )

    @property
    def _folders(self) -> tuple[Path, ...]:
        return self.done, self.parts, self.claims, self.workers

    def _holds_something_else(self) -> bool:
        """Whether there is more than what a worker makes before the manifest."""
        if not self.home.is_dir():
            return self.home.exists()
        return any(
            not path.name.startswith(_TEMPORARY)
            and not (path in self._folders and path.is_dir() and not any(path.iterdir()))
            for path in self.home.iterdir()
        )

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

    def place_rows(self, layout: Layout, batch: tuple[int, ...]) -> bool:
        """Have the memory-mapped rows, ``[*batch, ...]``, with room for all of them.

        Returns:
            Whether they are whole: not if they were cut off, or had to be made although chunks are done.

        Raises:
            OSError: there is no room on the disk.
        """
        made = self._rows_here() is None and self._make_rows(layout, batch)
        whole = not (made and self.all_done())
        for key, size in self._cut_off(layout, batch).items():
            whole = False
            with self._opened(key, os.O_WRONLY) as handle:
                os.ftruncate(handle, size)
        return whole

    def check_rows(self, layout: Layout, batch: tuple[int, ...]) -> None:
        """Look whether the files of rows are as long as they are to be.

        Raises:
            ValueError: one is not.
        """
        for key in self._cut_off(layout, batch):
            raise ValueError(
                f"{self.home} has been cut off: {key!r} lacks rows. Call work(), which explains again what is lost"
            )

    def _cut_off(self, layout: Layout, batch: tuple[int, ...]) -> dict[NestedKey, int]:
        """The entries whose files are too short, and how long they are to be."""
        count = int(np.prod(batch, dtype=np.int64))
        sizes = {
            key: count * shape.numel() * dtype.itemsize for key, (shape, dtype) in layout.entries.items()
        }
        return {key: size for key, size in sizes.items() if self._size(key) < size}

    def _size(self, key: NestedKey) -> int:
        with self._opened(key, os.O_RDONLY) as handle:
            return os.fstat(handle).st_size

    def _rows_here(self) -> Path | None:
        # The rows may get their name at any moment.
        return next((there for there in (self.rows, self.unfinished, self.rows) if there.is_dir()), None)

    def _make_rows(self, layout: Layout, batch: tuple[int, ...]) -> bool:
        """Make rows, and whether no other worker had done so."""
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
        try:
            empty.memmap_like(new)
            with suppress(OSError):  # another was first
                os.rename(new, self.unfinished)
                self._drop_unneeded()
                return not self.rows.is_dir()
        except (FileNotFoundError, RuntimeError):  # swept away by others, who have done all meanwhile
            if self._rows_here() is None:
                raise
        finally:
            shutil.rmtree(new, ignore_errors=True)
        return False

    def _drop_unneeded(self) -> None:
        """Remove rows that a worker made too late, when all were done and had their name."""
        if self.rows.is_dir() and self.unfinished.is_dir():
            shutil.rmtree(self.unfinished, ignore_errors=True)

    def write_rows(self, first: int, found: Mapping[NestedKey, Tensor]) -> None:
        """Write rows at their place, and wait until they are on the disk.

        Args:
            first: where the first of them is, counted over all axes of the batch.
            found: ``[rows, ...]`` by key.
        """
        for key, value in found.items():
            with self._opened(key, os.O_WRONLY) as handle:
                data = memoryview(bytes_of(value))
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
        """Give the rows their name, as all of them are there, and sweep away what killed workers left."""
        with suppress(OSError):
            if not self.rows.is_dir():
                os.rename(self.unfinished, self.rows)
                _sync_folder(self.home)
        self._drop_unneeded()
        for left in self.home.glob(f"{_TEMPORARY}*"):  # whoever is writing one writes it again
            with suppress(OSError):  # a folder that may only be read
                shutil.rmtree(left) if left.is_dir() else left.unlink()

    def reopen(self, units: Iterable[int]) -> None:
        """Count chunks as not done, and the rows as unfinished."""
        for unit in units:
            (self.done / f"{unit:09d}.json").unlink(missing_ok=True)
        with suppress(OSError):
            if not self.unfinished.is_dir():
                os.rename(self.rows, self.unfinished)

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
        path = self.parts / f"{unit:09d}.npz"
        try:
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
                for entry in arrays.files:
                    name, _, what = entry.rpartition("/")
                    found.setdefault(name, {})[what] = torch.from_numpy(arrays[entry])
        except _CUT_OFF as error:
            raise ValueError(f"{path} is not as it was written: {_MEND}") from error
        return found

    def write_block(self, unit: int, found: Mapping[NestedKey, Tensor]) -> None:
        """Write the rows of a chunk as a compressed block: a bit for each value that is not zero, and those values."""
        self.blocks.mkdir(exist_ok=True)
        self._put(self.blocks / f"{unit:09d}.z", packed(found))

    def read_block(self, unit: int, count: int, layout: Layout) -> dict[NestedKey, Tensor]:
        """The rows of a compressed block, ``[count, ...]`` by key."""
        path = self.blocks / f"{unit:09d}.z"
        try:
            return unpacked(path.read_bytes(), count, layout)
        except (FileNotFoundError, zlib.error) as error:
            raise ValueError(f"{path} is not as it was written: {_MEND}") from error

    def bring(self, path: Path) -> None:
        """Copy a part or block of another folder."""
        home = self.home / path.parent.name
        home.mkdir(exist_ok=True)
        self._put(home / path.name, path.read_bytes())

    def bring_words(self, other: JobFolder) -> None:
        """Copy what was typed to begin the job in another folder, unless it is known here."""
        if other.words.is_file() and not self.words.exists():
            self._put(self.words, other.words.read_bytes())

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
        numbers = (name.removesuffix(".json") for name in os.listdir(self.done) if name.endswith(".json"))
        return {int(number) for number in numbers if number.isascii() and number.isdigit()}

    def told_of(self, unit: int) -> dict[str, Plain]:
        """What was said when a chunk was committed."""
        path = self.done / f"{unit:09d}.json"
        found = read_json(path)
        if not isinstance(found, dict) or "crc32" not in found:
            raise ValueError(f"{path} is not as it was written: {_MEND}")
        return found

    def torn(self) -> list[int]:
        """The chunks of which it is said that they are done, but not as a worker says it."""
        found = []
        for unit in sorted(self.all_done()):
            try:
                self.told_of(unit)
            except FileNotFoundError:  # another worker has just seen it
                continue
            except ValueError:
                found.append(unit)
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
        for home in (self.rows, self.unfinished, self.rows):  # which may get their name at any moment
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
        for _ in range(_TIMES):
            new = self._temporary()
            try:
                self._write(new, data)
                os.replace(new, path)
                return _sync_folder(path.parent)
            except FileNotFoundError:  # swept away by another, who has done all meanwhile
                if not path.parent.is_dir():
                    break
            except BaseException:
                new.unlink(missing_ok=True)
                raise
        raise FileNotFoundError(f"{path} cannot be written: somebody took {path.parent} away")

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


def _sync_folder(folder: Path) -> None:
    with suppress(OSError):  # a system without
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
