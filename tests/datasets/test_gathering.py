"""What several machines have done, each in a folder of its own, is brought together as if one had done it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from a_job import a_job, same, steps

from tdhook.datasets import Place, gather, launch


def parts_of(home: Path, count: int = 3, **options: Any) -> list[Path]:
    """Folders in which parts of the job are done."""
    folders = [home / f"part {i}" for i in range(count)]
    for i, folder in enumerate(folders):
        status = a_job(folder, **options).work(place=Place(i, count, alone=True))
        assert not status.finished and status.chunks_done in (
            status.chunks // count,
            status.chunks // count + 1,
        )
    return folders


@pytest.mark.parametrize("keep", ["all", "compressed", torch.bfloat16, None], ids=str)
@pytest.mark.parametrize("several", [False, True])
def test_parts_are_brought_together(keep: Any, several: bool, tmp_path: Path) -> None:
    from a_job import policy

    checkpoints = {f"step {i}": policy(i).state_dict() for i in range(3)} if several else None
    options = {"keep": keep, "source": steps(150), "checkpoints": checkpoints}
    folders = parts_of(tmp_path, **options)
    found = gather(folders, tmp_path / "job")
    assert found.finished and found.brought == found.chunks and found.changed == {}
    assert a_job(tmp_path / "whole", **options).work().finished
    same(tmp_path / "job", tmp_path / "whole")
    job = a_job(tmp_path / "job", **options)
    assert job.verify(3).ok and job.result().done.all()
    assert gather(folders, tmp_path / "job").brought == 0


def test_it_goes_on_when_more_is_done(tmp_path: Path) -> None:
    home, into = tmp_path / "part", tmp_path / "job"
    chunks: list[int] = []
    a_job(home).work(on_done=chunks.append, until=lambda: len(chunks) == 5)
    first = gather([home], into)
    assert (first.brought, first.done, first.chunks, first.finished) == (5, 5, 38, False)
    assert not (into / "rows").exists()
    assert a_job(home).work().finished
    assert gather([home], into).brought == 33
    same(into, home)


def test_what_is_gathered_can_be_gone_on_with(tmp_path: Path) -> None:
    folders = parts_of(tmp_path)
    assert gather(folders[:2], tmp_path / "job").done == 25
    assert launch(a_job(tmp_path / "job"), 1).finished
    a_job(tmp_path / "whole").work()
    same(tmp_path / "job", tmp_path / "whole")


def test_what_was_changed_is_left_and_told(tmp_path: Path) -> None:
    folders = parts_of(tmp_path, 2)
    path = folders[0] / "rows.part" / "attr" / "observation.memmap"
    data = bytearray(path.read_bytes())
    data[20 * 16] ^= 1  # of row 20
    path.write_bytes(data)
    (folders[1] / "parts" / "000000030.npz").write_bytes(b"PK")
    (folders[1] / "done" / "000000031.json").write_bytes(b"{")
    (folders[1] / "parts" / "000000032.npz").unlink()
    found = gather(folders, tmp_path / "job")
    assert found.changed == {str(folders[0]): (1,), str(folders[1]): (30, 31, 32)}
    assert (found.done, found.finished) == (34, False)
    assert a_job(tmp_path / "job").work().finished
    a_job(tmp_path / "whole").work()
    same(tmp_path / "job", tmp_path / "whole")
    again = gather([*folders, tmp_path / "whole"], tmp_path / "again")
    assert again.finished and again.changed == {}  # another folder had them


def test_what_was_typed_is_brought_too(tmp_path: Path) -> None:
    folders = parts_of(tmp_path)
    for folder in folders[1:]:
        (folder / "words.json").write_text(f'{{"policy": "{folder.name}"}}')
    gather(folders[:2], tmp_path / "job")
    assert (tmp_path / "job" / "words.json").read_text() == '{"policy": "part 1"}'
    gather(folders[2:], tmp_path / "job")
    assert (tmp_path / "job" / "words.json").read_text() == '{"policy": "part 1"}'


def test_other_jobs_are_not_mixed(tmp_path: Path) -> None:
    a_job(tmp_path / "a").work()
    a_job(tmp_path / "b", chunk=32).work()
    with pytest.raises(
        ValueError, match=r"b and .*a are folders of different jobs, which differ in units\.chunk"
    ):
        gather([tmp_path / "a", tmp_path / "b"], tmp_path / "job")
    assert not (tmp_path / "job").exists()
    with pytest.raises(ValueError, match=r"is the folder of another job, which differs in units\.chunk"):
        gather([tmp_path / "a"], tmp_path / "b")
    with pytest.raises(FileNotFoundError, match=r"is no job folder of tdhook: it has no manifest\.json"):
        gather([tmp_path / "c"], tmp_path / "job")
    with pytest.raises(ValueError, match="no folders to gather from"):
        gather([], tmp_path / "job")
    shutil.rmtree(tmp_path / "b")
    (tmp_path / "b" / "rows").mkdir(parents=True)
    with pytest.raises(FileExistsError, match="holds something else"):
        gather([tmp_path / "a"], tmp_path / "b")
