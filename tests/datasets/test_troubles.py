"""What is in a job's way is said in a clear line, and the same command goes on afterwards."""

from __future__ import annotations

import codecs
import json
import os
import resource
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from a_job import a_job, same, steps
from forking import ended, forked

from tdhook.datasets import Job, gather, open_result
from tdhook.datasets.result import status_of

NOBODY = 65534


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    assert a_job(tmp_path / "whole", steps(70)).work().finished
    return tmp_path / "whole"


@pytest.fixture
def open_to_all() -> Iterator[Path]:
    """A folder that users without rights can reach."""
    home = Path(tempfile.mkdtemp())
    home.chmod(0o777)
    yield home
    subprocess.run(["chmod", "-R", "u+rwX", str(home)], check=True)
    shutil.rmtree(home)


def as_nobody(work: Callable[[], object]) -> int:
    """The exit code of a process without rights that does it."""

    def first() -> None:
        if os.getuid() == 0:
            codecs.lookup("cp437")  # of zip files: what is not loaded yet may not be there to be read
            os.setgid(NOBODY)
            os.setuid(NOBODY)
        work()

    return ended(forked(first))


def a_small_job(home: Path, **options: Any) -> Job:
    return a_job(home, steps(70), **options)


def test_files_that_may_not_grow(whole: Path, tmp_path: Path) -> None:
    home = tmp_path / "job"

    def work() -> None:
        job = a_small_job(home)
        job.chunks.make_room()
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (700, 700))
        with pytest.raises(
            OSError, match=r"File too large.*: the work on .*job has stopped\. What is done stays"
        ):
            job.work()

    assert ended(forked(work)) == 0
    assert [one for one in home.iterdir() if one.name.startswith(".")] == []
    assert a_small_job(home).work().finished
    same(home, whole)


def test_a_full_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=120k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no disk of its own can be mounted here")
    try:
        data = steps(3000)
        job = a_job(disk / "job", data, chunk=200)
        with pytest.raises(OSError, match=r"No space left on device.* has stopped\. What is done stays done"):
            job.work()
        status = job.status()
        assert 0 < status.chunks_done < status.chunks
        assert list((disk / "job" / "claims").iterdir()) == []
        assert job.result(partial=True).explained.batch_size == (status.done,)
        subprocess.run(["mount", "-o", "remount,size=9000k", str(disk)], check=True)
        assert a_job(disk / "job", data, chunk=200).work().finished
        assert a_job(tmp_path / "whole", data, chunk=200).work().finished
        same(disk / "job", tmp_path / "whole")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_source_that_may_only_be_read(open_to_all: Path) -> None:
    source = open_to_all / "source"
    steps(70).memmap(source)
    for path in (source, *source.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}
    assert as_nobody(lambda: a_job(open_to_all / "job", source).work()) == 0
    assert {path: path.read_bytes() for path in source.rglob("*") if path.is_file()} == before
    assert a_job(open_to_all / "job", source).status().finished


def test_a_folder_that_may_only_be_read(open_to_all: Path) -> None:
    home = open_to_all / "job"
    job = a_small_job(home)
    chunks: list[int] = []
    job.work(on_done=chunks.append, until=lambda: len(chunks) == 2)
    subprocess.run(["chmod", "-R", "a+rX,a-w", str(home)], check=True)

    def work() -> None:
        ours = a_small_job(home)
        assert ours.status().chunks_done == 2
        assert ours.result(partial=True).explained.batch_size == (32,)
        with pytest.raises(
            PermissionError, match=r"Permission denied.*job has stopped\. What is done stays done"
        ):
            ours.work()
        with pytest.raises(PermissionError):
            a_small_job(open_to_all / "job" / "other")

    assert as_nobody(work) == 0
    subprocess.run(["chmod", "-R", "u+w", str(home)], check=True)
    assert a_small_job(home).work().finished
    subprocess.run(["chmod", "-R", "a+rX,a-w", str(home)], check=True)

    def look() -> None:
        ours = a_small_job(home)
        assert ours.result().rows.batch_size == (70,) and ours.verify(2).ok

    assert as_nobody(look) == 0


@pytest.mark.parametrize("text", ["", '{"tdhook": ', "[]", "{}"])
def test_a_manifest_that_is_none(text: str, whole: Path, tmp_path: Path) -> None:
    home = tmp_path / "job"
    a_small_job(home)
    kept = (home / "manifest.json").read_bytes()
    (home / "manifest.json").write_text(text)
    with pytest.raises(
        ValueError, match=r"manifest\.json is (not valid JSON \(cut off\?\)|no manifest of a job)"
    ):
        a_small_job(home)
    (home / "manifest.json").write_bytes(kept)
    assert a_small_job(home).work().finished
    same(home, whole)


@pytest.mark.parametrize("rows", [2**70, -1, "many"])
def test_a_manifest_of_no_number_of_rows(rows: object, whole: Path) -> None:
    told = json.loads((whole / "manifest.json").read_text())
    told["units"]["rows"] = rows
    (whole / "manifest.json").write_text(json.dumps(told))
    with pytest.raises(
        ValueError, match=rf"does not say all of what is in the folder \(.*{rows}'? is no number"
    ):
        open_result(whole)


@pytest.mark.parametrize(
    "name", ["rows/meta.json", "rows.part/a", "blocks/1.z", "done/1.json", "claims/x", "a.txt"]
)
def test_a_folder_of_something_else(name: str, tmp_path: Path) -> None:
    path = tmp_path / "job" / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    with pytest.raises(FileExistsError, match="holds something else than a job of tdhook"):
        a_small_job(tmp_path / "job")
    assert path.read_text() == "mine" and len([*(tmp_path / "job").rglob("*")]) == 2 - ("/" not in name)
    with pytest.raises(FileExistsError, match="holds something else"):
        a_small_job(path)


@pytest.mark.parametrize("finished", [True, False])
def test_notes_that_are_cut_off(finished: bool, whole: Path, tmp_path: Path) -> None:
    home = tmp_path / "job"
    job = a_small_job(home)
    chunks: list[int] = []
    job.work(on_done=chunks.append, until=None if finished else lambda: len(chunks) == 3)
    (home / "done" / "000000001.json").write_text("")
    (home / "done" / "000000002.json").write_text('{"rows": [32, 48]')
    assert job.verify(2).changed == (1, 2)
    with pytest.warns(
        UserWarning, match=r"notes of chunks that are no such notes: 2 of 5 chunks are explained again"
    ):
        assert job.work().finished
    same(home, whole)


def test_notes_that_are_of_no_chunk(whole: Path, tmp_path: Path) -> None:
    home = tmp_path / "job"
    job = a_small_job(home)
    chunks: list[int] = []
    job.work(on_done=chunks.append, until=lambda: len(chunks) == 3)
    note = (home / "done" / f"{chunks[0]:09d}.json").read_bytes()
    for name in ("000000005.json", "000000099.json", "notes.json", "000000004 (copy).json", "-00000001.json"):
        (home / "done" / name).write_bytes(note)
    assert (job.status().chunks_done, job.status().finished) == (3, False)
    assert status_of(home).done == job.result(partial=True).done.sum() == 48
    with pytest.raises(RuntimeError, match="3 of 5 chunks are done"):
        job.result()
    assert job.verify().chunks == 3 and job.verify().ok
    found = gather([home], tmp_path / "gathered")
    assert (found.brought, found.finished, found.changed) == (3, False, {})
    assert job.work().finished
    assert torch.equal(
        job.result().rows["attr", "observation"], open_result(whole).rows["attr", "observation"]
    )


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("how", ["short", "empty", "gone"])
def test_rows_that_are_cut_off(how: str, finished: bool, whole: Path, tmp_path: Path) -> None:
    home = tmp_path / "job"
    job = a_small_job(home)
    chunks: list[int] = []
    job.work(on_done=chunks.append, until=None if finished else lambda: len(chunks) == 3)
    rows = home / ("rows" if finished else "rows.part")
    path = rows / "attr" / "observation.memmap"
    if how == "gone":
        shutil.rmtree(rows)
    else:
        os.truncate(path, 20 * 16 if how == "short" else 0)
    lost = {"short": 4 if finished else 2}.get(how, 5 if finished else 3)
    if how != "gone":
        with pytest.raises(ValueError, match=r"cut off: .* lacks rows\. Call work\(\), which explains again"):
            job.result(partial=True)
        assert len(job.verify().changed) == lost
    with pytest.warns(UserWarning, match=rf"has lost rows: {lost} of 5 chunks are explained again"):
        assert job.work().finished
    same(home, whole)


@pytest.mark.parametrize("keep", ["all", "compressed"])
def test_parts_that_are_cut_off(keep: str, tmp_path: Path) -> None:
    home = tmp_path / "job"
    job = a_small_job(home, keep=keep)
    assert job.work().finished
    expected = {path: path.read_bytes() for path in sorted((home / "parts").iterdir())}
    for i, path in enumerate(expected):
        path.write_bytes(expected[path][: (0, 1, 50, 400, len(expected[path]))[i]])
    with pytest.raises(
        ValueError, match=r"npz is not as it was written: verify\(mend=True\) has work\(\) explain it"
    ):
        _ = job.result().reduced
    lost = [0, 1, 2, 3]
    if keep == "compressed":
        (home / "blocks" / "000000004.z").unlink()
        with pytest.raises(ValueError, match=r"z is not as it was written: verify"):
            job.result().blocks()[65:70]
        lost.append(4)
    found = job.verify(5, mend=True)
    assert found.changed == tuple(lost) and found.differ == (0, 1, 2, 3)
    assert job.status().chunks_done == 5 - len(lost)
    assert job.work().finished and job.verify(5).ok
    assert expected == {path: path.read_bytes() for path in sorted((home / "parts").iterdir())}
