"""Rollouts on disk: memory-mapped TensorDicts, written whole, and read without running what they hold."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from urllib.parse import unquote

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from tdhook.files import completed, is_plain_file, read_json, require_text, saved_alone, together

__all__ = ["load", "require_replaceable", "save"]

_DEEPEST = 64
"""How deeply entries may be nested in a folder that is read."""
_LARGEST = 2**48
"""How many elements an entry may have: beyond, sizes are not computed rightly."""


def save(rollout: TensorDictBase, folder: str | os.PathLike[str]) -> Path:
    """Write a rollout as a memory-mapped TensorDict, to be read with :func:`load` or ``TensorDict.load_memmap``.

    It is written beside the folder and takes its place when it is complete: what was there stays where this fails.

    Args:
        rollout: the rollout.
        folder: where; made if missing. A TensorDict that was saved there, whole or in part, is replaced.

    Raises:
        FileExistsError: the folder holds something else.
        OSError: there is no room on the disk.
    """
    folder = Path(folder)
    require_replaceable(folder)
    place = Path(os.path.abspath(folder))
    with together(place.parent) as new:
        written = new / place.name
        written.mkdir()
        dense = rollout.contiguous()
        _reserve(written, dense)
        dense.memmap(written)
    return folder


def _reserve(folder: Path, rollout: TensorDictBase) -> None:
    """Find out whether there is room on the disk: a page of a mapped file that has none ends the process."""
    files = []
    try:
        for i, value in enumerate(rollout.values(True, True)):
            if isinstance(value, Tensor) and not value.is_nested and value.numel():
                files.append(folder / f"{i}.memmap")
                _fill(files[-1], value.numel() * value.element_size())
    finally:
        for path in files:
            path.unlink(missing_ok=True)


def _fill(path: Path, size: int) -> None:
    with open(path, "wb") as file:
        if not hasattr(os, "posix_fallocate"):
            file.write(bytes(size))
            return
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path.parent)) from None


def load(folder: str | os.PathLike[str]) -> TensorDict:
    """Read a rollout that :func:`save` wrote, memory-mapped: its tensors.

    Anyone's folder can be read: nothing is unpickled, nothing imported, no link followed. Entries that are no tensors
    are left out, with a warning that names them. What is changed in memory is not changed on disk.

    Raises:
        FileNotFoundError: there is no saved TensorDict.
        ValueError: a file is missing, cut off or not as it is written. The message names it.
    """
    folder = Path(folder)
    require_text(folder)
    with suppress(OSError):  # where nobody may write, nobody has
        completed(folder.parent)
    if not (folder / "meta.json").is_file():
        raise FileNotFoundError(f"{folder} holds no saved TensorDict: it has no meta.json")
    if not _is_tensordict(_metadata(folder)):
        raise ValueError(f"{folder} holds no TensorDict, but {_metadata(folder).get('_type')}")
    skipped: list[str] = []
    rollout = _read(folder, (), skipped)
    if skipped:
        warnings.warn(
            f"entries of {folder} that are no tensors are not read: {', '.join(skipped)}", stacklevel=2
        )
    return rollout


def _read(folder: Path, at: tuple[str, ...], skipped: list[str]) -> TensorDict:
    metadata = _metadata(folder)
    rollout = TensorDict({}, batch_size=_shape(metadata.get("shape"), folder))
    # Names of files are quoted keys; versions of tensordict differ in what they quote.
    files = {unquote(path.name): path for path in folder.iterdir()}
    for key, entry in metadata.items():
        if not isinstance(entry, Mapping):
            continue
        if "type" in entry:
            value = _nested(files.get(key, folder / key), (*at, key), skipped)
        elif entry.get("is_nested"):
            value = None
        else:
            value = _mapped(files.get(f"{key}.memmap", folder / f"{key}.memmap"), entry, folder)
        if value is None:
            skipped.append(repr(".".join((*at, key))))
            continue
        try:
            rollout.set(key, value)
        except (RuntimeError, KeyError) as error:
            raise ValueError(
                f"{folder / 'meta.json'} and its entry {key!r} do not fit together: {error}"
            ) from None
    return rollout


def _nested(folder: Path, at: tuple[str, ...], skipped: list[str]) -> TensorDict | None:
    if folder.is_symlink() or not folder.is_dir():
        raise ValueError(f"{folder} is missing, and the TensorDict that was saved has it")
    if len(at) > _DEEPEST:
        raise ValueError(f"{folder} is nested more than {_DEEPEST} deep")
    return _read(folder, at, skipped) if _is_tensordict(_metadata(folder)) else None


def _metadata(folder: Path) -> Mapping[str, object]:
    path = folder / "meta.json"
    if not is_plain_file(path):
        raise ValueError(f"{path} is missing, or is no file")
    found = read_json(path)
    if not isinstance(found, Mapping):
        raise ValueError(f"{path} is not as that of a saved TensorDict")
    return found


def _is_tensordict(metadata: Mapping[str, object]) -> bool:
    return str(metadata.get("_type")).rpartition(".")[2] == "TensorDict'>"


def _shape(given: object, folder: Path) -> torch.Size:
    if not isinstance(given, list) or not all(type(size) is int and size >= 0 for size in given):
        raise ValueError(f"{folder / 'meta.json'} has a shape that is none: {given!r}")
    if math.prod(size or 1 for size in given) > _LARGEST:
        raise ValueError(f"{folder / 'meta.json'} has a shape that is too large: {given!r}")
    return torch.Size(given)


def _mapped(path: Path, entry: Mapping[str, object], folder: Path) -> Tensor:
    """One tensor, mapped so that nothing is written back."""
    shape = _shape(entry.get("shape"), folder)
    dtype: object = getattr(torch, str(entry.get("dtype")).removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{folder / 'meta.json'} has a dtype that is none: {entry.get('dtype')!r}")
    size = shape.numel() * torch.empty((), dtype=dtype).element_size()
    if size == 0:
        return torch.empty(shape, dtype=dtype)
    if not is_plain_file(path):
        raise ValueError(f"{path} is missing, or is no file")
    if path.stat().st_size != size:
        raise ValueError(
            f"{path} has {path.stat().st_size} bytes, and should have {size}: it was cut off or changed"
        )
    return torch.from_file(str(path), shared=False, size=shape.numel(), dtype=dtype).reshape(shape)


def require_replaceable(folder: Path) -> None:
    """Make sure that :func:`save` may write to a folder: there is none, or nothing but a saved TensorDict in it.

    Raises:
        FileExistsError: there is something else.
        ValueError: its name is no text.
    """
    require_text(folder)
    above = next(parent for parent in (folder, *folder.parents) if os.path.lexists(parent))
    if not above.is_dir():
        raise FileExistsError(f"{above} is a file, where a folder is to be written")
    other = None if above != folder else saved_alone(folder)
    if other is not None:
        raise FileExistsError(
            f"{folder} holds something else than a saved TensorDict: choose another folder ({other} is in it)"
        )
