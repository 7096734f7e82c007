"""Output folders: what `tdhook demo` and `tdhook explain` write, all of it or nothing, and what is read of them.

A folder has a manifest: the size and SHA-256 of each file of the run that wrote it, and of what was made of it since.
So it is found out where a file was cut off or changed; and the next run removes what it does not write itself.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tensordict import TensorDict

import tdhook
from tdhook.cli.summaries import Told, told_by
from tdhook.files import (
    completed,
    fingerprint,
    is_plain_file,
    locked,
    read_json,
    room,
    together,
    write_whole,
)
from tdhook.rl.saved import load, require_replaceable

__all__ = ["Output", "made_of", "picture_names", "read_output", "replaced_output", "require_output"]

_MANIFEST, _SUMMARY, _UNFINISHED = "manifest.json", "summary.json", "unfinished.json"
_KNOWN = ("relevance.png", "frames.png", "report.html", "video.mp4")
_MADE = (".png", ".html", ".mp4", ".gif")
_LONGEST = 80
"""Letters of a label in the name of a picture."""


@dataclass(frozen=True)
class Output:
    """What was read of an output folder.

    Attributes:
        folder: where it lies.
        rollout: the explained rollout.
        told: what the summary says.
        manifest: what the manifest says; empty where an earlier version of tdhook wrote none.
    """

    folder: Path
    rollout: TensorDict
    told: Told
    manifest: Mapping[str, Mapping[str, object]]


def picture_names(labels: list[str]) -> list[str]:
    """A name for the picture of each explanation: no two of them are one file, on any system."""
    names: list[str] = []
    for i, label in enumerate(labels):
        slug = re.sub(r"\W+", "-", label, flags=re.ASCII).strip("-")[:_LONGEST]
        stem = "relevance" if i == 0 else f"relevance-{slug or i}"
        name, number = f"{stem}.png", 2
        while name.lower() in map(str.lower, names):
            name, number = f"{stem}-{number}.png", number + 1
        names.append(name)
    return names


def require_output(out: Path) -> None:
    """Make sure that a run may write to a folder: what it would replace is that of another run.

    Raises:
        FileExistsError: there is something else.
    """
    require_replaceable(out / "rollout")
    if (out / "meta.json").exists():
        raise FileExistsError(f"{out} holds a saved TensorDict: choose another folder")
    completed(out)
    for name in (_SUMMARY, _MANIFEST):
        if (out / name).is_dir() or _of_another(out / name):
            raise FileExistsError(f"{out / name} was not written by tdhook: choose another folder")


def _of_another(path: Path) -> bool:
    if not path.exists():
        return False
    try:
        found = read_json(path)
    except (OSError, ValueError):
        return False  # cut off
    return not isinstance(found, dict) or "tdhook" not in found


@contextmanager
def replaced_output(out: Path, what: Mapping[str, object]) -> Iterator[Path]:
    """A room for what a run writes, which takes the place of all that is of the run before when the block is done.

    Until then the folder says that it is not finished, and of what: where this process is stopped, it goes on to say
    so. An error leaves the folder as it was.
    """
    require_output(out)
    note = out / _UNFINISHED
    with together(out, partial(_outdated, out)) as new:
        try:
            write_whole(note, _as_json(what))
            yield new
            files = {path.relative_to(new).as_posix(): fingerprint(path) for path in _files(new)}
            manifest = {"tdhook": tdhook.__version__, "files": files, "made": {}}
            (new / _MANIFEST).write_bytes(_as_json(manifest))
        except Exception as error:
            note.unlink(missing_ok=True)
            if not isinstance(error, OSError):
                raise
            raise OSError(f"{out} could not be written, and is as it was: {error}") from error


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if is_plain_file(path))


def _as_json(data: Mapping[str, object]) -> bytes:
    return (json.dumps(data, indent=2, allow_nan=False) + "\n").encode("ascii")


def _outdated(out: Path) -> list[str]:
    """What goes before anything comes: all that is of the run before, or was made of it."""
    found = [_MANIFEST, _SUMMARY, _UNFINISHED]
    try:
        manifest = _manifest(out)
        told = [str(part["of"]) for part in _explanations(out)]
    except (OSError, ValueError):
        manifest, told = {"files": {}, "made": {}}, []
    if manifest["files"] or told:
        found += [*_KNOWN, *(f"relevance-{_slug(label)}.png" for label in told)]
    found += [name for name in manifest["files"] if _is_made(name) and name.startswith("relevance")]
    found += [
        name for name, entry in manifest["made"].items() if _is_made(name) and _is_as(out / name, entry)
    ]
    return [name for name in dict.fromkeys(found) if os.path.lexists(out / name)]


def _is_made(name: str) -> bool:
    return name.endswith(_MADE) and "/" not in name


def _is_within(name: str) -> bool:
    """Whether a name in a manifest is one that a run writes."""
    return name == _SUMMARY or _is_made(name) or (name.startswith("rollout/") and ".." not in name.split("/"))


def _is_as(path: Path, wanted: Mapping[str, object]) -> bool:
    return is_plain_file(path) and fingerprint(path) == wanted


def _slug(label: str) -> str:
    """What pictures were called by tdhook 0.1.0, which kept no manifest."""
    return re.sub(r"\W+", "-", label).strip("-")


def _explanations(out: Path) -> list[Mapping[str, object]]:
    summary = read_json(out / _SUMMARY)
    parts: object = summary.get("explanations") if isinstance(summary, dict) else None
    listed: list[object] = parts if isinstance(parts, list) else []
    return [part for part in listed if isinstance(part, dict) and "of" in part]


def _manifest(folder: Path) -> dict[str, dict[str, Mapping[str, object]]]:
    """What the manifest says of each file; nothing where there is none.

    Raises:
        ValueError: it is no manifest.
    """
    path = folder / _MANIFEST
    if not path.exists():
        return {"files": {}, "made": {}}
    given = read_json(path)
    found: dict[str, dict[str, Mapping[str, object]]] = {}
    for part in ("files", "made"):
        entries: object = given.get(part) if isinstance(given, dict) else None
        if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
            raise ValueError(
                f"{path} is no manifest of tdhook: {part!r} is not there, or is no table of files"
            )
        found[part] = entries
    return found


def read_output(folder: Path) -> Output:
    """The explained rollout and the summary of an output folder. Nothing that is in it is run.

    Raises:
        FileNotFoundError: it is no such folder.
        ValueError: it is not finished, or what is in it cannot be read. The message names the file.
    """
    if folder.is_dir():
        completed(folder)
    summary, rollout = folder / _SUMMARY, folder / "rollout"
    if not summary.is_file() and not rollout.is_dir() and not (folder / _UNFINISHED).is_file():
        raise FileNotFoundError(
            f"{folder} is no output folder of tdhook: give the one that tdhook demo or tdhook explain wrote, with its "
            "summary.json and rollout"
        )
    with locked(folder, shared=True):
        _require_finished(folder)
        manifest = _manifest(folder)
        if manifest["files"]:
            _require_whole(folder, manifest["files"])
        output = Output(folder, load(rollout), told_by(summary), manifest["files"])
    if not output.manifest:
        warnings.warn(
            f"{folder} has no manifest.json, so it cannot be told whether all of it is of one run",
            stacklevel=2,
        )
    return output


def _require_finished(folder: Path) -> None:
    note = folder / _UNFINISHED
    there = (folder / _SUMMARY).is_file() and (folder / "rollout").is_dir()
    if note.exists():
        said = _said(note)
        rest = (
            f"what is there is whole, and of the run before: to go on with that, delete {note}"
            if there
            else "there is nothing of it"
        )
        raise ValueError(f"a run that was to write {folder}{said} is not finished: run it again ({rest})")
    if not there:
        missing = "rollout" if (folder / _SUMMARY).is_file() else "summary.json"
        raise ValueError(f"{folder} is incomplete, without its {missing}: run tdhook explain again")


def _said(note: Path) -> str:
    try:
        what = read_json(note)
    except (OSError, ValueError):
        return ""
    return f" ({', '.join(f'{k}: {v}' for k, v in what.items())})" if isinstance(what, dict) else ""


def _require_whole(folder: Path, files: Mapping[str, Mapping[str, object]]) -> None:
    if _SUMMARY not in files or "rollout/meta.json" not in files:
        raise ValueError(f"{folder / _MANIFEST} is incomplete: run tdhook explain again")
    for path in _files(folder / "rollout"):
        if path.suffix in (".memmap", ".json") and path.relative_to(folder).as_posix() not in files:
            raise ValueError(f"{path} was not written by the run: run tdhook explain again")
    for name, wanted in files.items():
        path = folder / name
        read = name == _SUMMARY or name.startswith("rollout/")
        if not _is_within(name) or (not read and not path.exists()):
            continue  # a picture that was taken away
        found = fingerprint(path) if is_plain_file(path) else {"size": "no"}
        if found == wanted:
            continue
        changed = (
            f"{path} is not as its run wrote it: it has {found['size']} bytes of {wanted.get('size')}"
            if found["size"] != wanted.get("size")
            else f"{path} is not as its run wrote it: its SHA-256 is another"
        )
        if read:
            raise ValueError(f"{folder} cannot be read: {changed}; run tdhook explain again")
        warnings.warn(changed, stacklevel=3)


@contextmanager
def made_of(output: Output, path: Path) -> Iterator[Path]:
    """Where to write what is made of an output folder, a page or a video, to be put at a path.

    In the folder itself it is put only while that is still what was read, and is noted in its manifest, so that it goes
    with the next run.

    Raises:
        ValueError: there lies a file of the run, or another run has written to the folder.
        OSError: the folder cannot be written to.
    """
    folder = output.folder
    inside = path.parent.resolve() == folder.resolve()
    if (folder / "rollout").resolve() in path.resolve().parents or (inside and path.name in output.manifest):
        raise ValueError(
            f"{path} is of what the run wrote, and is not to be replaced: give another file as --out"
        )
    if not inside:
        yield path
        return
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, where a file is to be written")
    try:
        with room(folder) as beside:
            new = beside / path.name
            yield new
            with locked(folder):
                now = _manifest(folder)
                if now["files"] != output.manifest:
                    raise ValueError(f"another run has written to {folder} meanwhile: do it again")
                if output.manifest and _is_made(path.name):
                    _note_made(folder, path.name, new)
                os.replace(new, path)
    except PermissionError as error:
        raise PermissionError(f"{folder} cannot be written to: give --out FILE ({error})") from error


def _note_made(folder: Path, name: str, new: Path) -> None:
    path = folder / _MANIFEST
    given = read_json(path)
    assert isinstance(given, dict)
    given["made"][name] = fingerprint(new)
    beside = new.with_name(_MANIFEST)
    beside.write_bytes(_as_json(given))
    os.replace(beside, path)
