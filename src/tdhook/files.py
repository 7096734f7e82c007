"""Files: written whole or not at all, and several of them together.

What is written lies in a room beside its place until it is complete, and takes the place then. Whoever is killed or
interrupted, or finds the disk full, leaves what was there before. Where several entries belong together, they are moved
by a journal: if a process is killed while it moves them, the next one that looks at the folder goes on.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

if sys.platform != "win32":
    import fcntl

__all__ = [
    "completed",
    "fingerprint",
    "is_plain_file",
    "locked",
    "read_json",
    "replacing",
    "require_text",
    "room",
    "saved_alone",
    "together",
    "write_whole",
]

_ROOM = ".tdhook-"
_COMPLETE = f"{_ROOM}complete"
_JOURNAL = f"{_ROOM}journal"
_ASIDE = f"{_ROOM}aside-"
_BLOCK = 1 << 20
_OURS = (".json", ".png", ".html", ".mp4", ".gif")
"""How the names of files end that may be replaced or removed by a journal."""
_OF_SAVED = ("meta.json", "other.pickle", ".DS_Store")
"""Files of a saved TensorDict, beside those that end in ``.memmap``."""


@contextmanager
def locked(folder: Path, *, shared: bool = False) -> Iterator[None]:
    """Keep other processes of tdhook from changing a folder meanwhile; ``shared`` lets others read it, too.

    The lock goes with the process. Where the system has none of this kind, there is none.
    """
    if sys.platform == "win32":
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextmanager
def room(folder: Path) -> Iterator[Path]:
    """A new folder inside a folder, to write in; it goes with the block, and so do those that killed processes left."""
    with locked(folder):
        _sweep(folder)
        made = Path(tempfile.mkdtemp(prefix=_ROOM, dir=folder))
        handle = None if sys.platform == "win32" else os.open(made, os.O_RDONLY)
        if handle is not None:
            _is_free(handle)  # a room that is in use is locked
    try:
        inner = made / "new"  # which can be locked by those who write to it
        inner.mkdir()
        yield inner
    finally:
        shutil.rmtree(made, ignore_errors=True)
        if handle is not None:
            os.close(handle)


def _sweep(folder: Path) -> None:
    if sys.platform == "win32":
        return
    for left in folder.glob(f"{_ROOM}*"):
        if left.name == _COMPLETE or left.is_symlink() or not left.is_dir():
            continue
        handle = os.open(left, os.O_RDONLY)
        try:
            if _is_free(handle):
                shutil.rmtree(left, ignore_errors=True)
        finally:
            os.close(handle)


def _is_free(handle: int) -> bool:
    """Whether nobody has a lock on it; then it is ours until the handle is closed."""
    if sys.platform == "win32":
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def require_text(folder: Path) -> None:
    """Make sure that torch can map what lies in a folder: its path is text, and not any bytes.

    Raises:
        ValueError: it is none.
    """
    try:
        str(folder).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{folder} is no text in UTF-8, and torch maps no files there: rename it") from None


def _make(folder: Path) -> None:
    for above in (folder, *folder.parents):
        if os.path.lexists(above) and not above.is_dir():
            raise FileExistsError(f"{above} is a file, where a folder is to be written")
    folder.mkdir(parents=True, exist_ok=True)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write a file, so that it takes its place when the block is done, and does not where it raises.

    Missing folders are made. A link is replaced itself, not what it leads to; a device or pipe is written to.

    Raises:
        IsADirectoryError: the path is a folder.
        FileExistsError: there is a file where a folder of it is to be.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, where a file is to be written")
    _make(path.parent)
    if path.exists() and not path.is_file():
        yield path
        return
    with room(path.parent) as beside:
        new = beside / path.name
        yield new
        if is_plain_file(path):
            shutil.copymode(path, new)
        os.replace(new, path)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file, or leave what is there."""
    try:
        with replacing(path) as new, open(new, "wb") as file:
            file.write(data)
            file.flush()
            with suppress(OSError):  # a pipe, say
                os.fsync(file.fileno())
    except OSError as error:
        if error.filename is not None or error.strerror is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error  # a full disk


@contextmanager
def together(folder: Path, outdated: Callable[[], Iterable[str]] = tuple) -> Iterator[Path]:
    """A room whose entries take the places of those of their names in a folder, all of them, when the block is done.

    Args:
        folder: made if missing.
        outdated: names of entries of the folder that go before any comes; asked when nobody else changes the folder.
    """
    made = not folder.exists()
    _make(folder)
    try:
        with room(folder) as new:
            yield new
            with locked(folder):
                _finish(folder)
                moved = sorted(entry.name for entry in new.iterdir())
                journal = {"remove": [*outdated()], "move": moved}
                (new / _JOURNAL).write_text(json.dumps(journal), encoding="utf-8")
                os.rename(new, folder / _COMPLETE)
                _finish(folder)
    except BaseException:
        if made:
            with suppress(OSError):  # not empty: there are others who write to it
                folder.rmdir()
        raise


def completed(folder: Path) -> None:
    """Go on with what a killed process had written completely, and was moving to its place."""
    if _is_folder(folder / _COMPLETE):
        with locked(folder):
            _finish(folder)


def _finish(folder: Path) -> None:
    """Remove and move what the journal says. Each step can be done again."""
    complete = folder / _COMPLETE
    if not _is_folder(complete):
        return
    journal = _journal(complete / _JOURNAL)
    for name in journal["remove"]:
        if name in journal["move"] and not os.path.lexists(complete / name):
            continue  # the new one is there already
        if not _is_folder(folder / name) and name.endswith(_OURS):
            (folder / name).unlink(missing_ok=True)
    for name in journal["move"]:
        if os.path.lexists(complete / name) and _may_be_replaced(folder / name):
            if (folder / name).is_dir():  # or a link to one
                aside = complete / f"{_ASIDE}{name}"
                shutil.rmtree(aside, ignore_errors=True)
                os.rename(folder / name, aside)
            os.replace(complete / name, folder / name)
    shutil.rmtree(complete)


def _journal(path: Path) -> dict[str, list[str]]:
    """Names to be removed and to be moved: plain ones, whatever is written there."""
    given: object = {}
    if is_plain_file(path):
        with suppress(ValueError):  # no journal: then nothing is moved
            given = read_json(path)
    found = {}
    for part in ("remove", "move"):
        names: object = given.get(part, []) if isinstance(given, dict) else []
        listed = names if isinstance(names, list) else []
        found[part] = [name for name in listed if isinstance(name, str) and _is_name(name)]
    return found


def _is_name(text: str) -> bool:
    return text not in ("", ".", "..") and not set(text) & {"/", "\\", "\0"} and not text.startswith(_ROOM)


def _may_be_replaced(path: Path) -> bool:
    if not os.path.lexists(path):
        return True
    return saved_alone(path) is None if _is_folder(path) else path.suffix in _OURS or path.is_symlink()


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def saved_alone(folder: Path) -> str | None:
    """What a folder holds beside a saved TensorDict, whole or in part: the name of one such file; ``None`` if nothing.

    What is in part there was left by a process that was killed while it saved it.
    """
    for home, _, names in os.walk(folder):
        for name in names:
            path = Path(home, name)
            if not name.endswith(".memmap") and name not in _OF_SAVED:
                return str(path.relative_to(folder))
            if name == "meta.json" and not _is_metadata(path):
                return str(path.relative_to(folder))
    return None


def _is_metadata(path: Path) -> bool:
    try:
        saved = read_json(path)
    except (OSError, ValueError):
        return True  # cut off
    return isinstance(saved, dict) and "tensordict" in str(saved.get("_type"))


def is_plain_file(path: Path) -> bool:
    """Whether it is a file, no link to one, and no device or pipe."""
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except OSError:
        return False


def read_json(path: Path) -> object:
    """What a JSON file says.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no JSON, which knows no NaN, or is nested too deeply; or it is a folder, or a pipe.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):  # to read a pipe is to wait for ever
        raise ValueError(f"{path} is no file")
    try:
        found: object = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number)
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply to be read") from None
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON (cut off?): {error}") from error
    return found


def _no_number(text: str) -> object:
    raise ValueError(f"{text} is no number")


def fingerprint(path: Path) -> dict[str, object]:
    """Size of a file in bytes, and its SHA-256: what a manifest says of it."""
    digest = hashlib.sha256()
    size = 0
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            size += len(block)
    return {"size": size, "sha256": digest.hexdigest()}
