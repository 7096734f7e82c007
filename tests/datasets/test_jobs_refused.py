"""Jobs: what they refuse, what stops them and what does not, and what they keep."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from explaining import ATTR, job, policy, rows_of, steps
from torch import nn

from tdhook import LRP, Target
from tdhook.datasets import Job, Kept, Moments


def test_what_is_not_done_is_no_zero(tmp_path: Path) -> None:
    done = job(tmp_path / "job")
    chunks: list[int] = []
    status = done.work(on_done=chunks.append, until=lambda: len(chunks) == 2)
    assert (status.chunks_done, status.chunks, status.done, status.rows) == (2, 7, 32, 100)
    assert not (tmp_path / "job" / "rows").exists()
    with pytest.raises(RuntimeError, match="2 of 7 chunks are done"):
        done.result()
    there = done.result(partial=True)
    assert there.done.nonzero()[:, 0].tolist() == list(range(32))
    with pytest.raises(RuntimeError, match="would be taken for rows without relevance"):
        _ = there.rows
    assert there.explained.batch_size == (32,)
    assert done.work().finished
    torch.testing.assert_close(done.result().rows[ATTR][:32], there.explained[ATTR])


@pytest.mark.parametrize(
    "options, differs",
    [
        ({"method": LRP("epsilon_plus", target=Target("action_value", 1))}, "method.seeder.index"),
        ({"method": LRP("epsilon", target=Target("action_value", "action"))}, "method.composite"),
        ({"source": steps(99)}, "units.rows: 99 and not 100"),
        ({"chunk": 32}, "units.chunk: 32 and not 16"),
        ({"keep": torch.bfloat16}, "layout"),
        ({"reduce": [Moments()]}, "reduce"),
        ({"rows": slice(None)}, "source.chosen"),
        ({"threads": 2}, "threads: 2 and not 1"),
    ],
)
def test_another_job_is_refused(options: dict[str, Any], differs: str, tmp_path: Path) -> None:
    job(tmp_path / "job")
    job(tmp_path / "job")  # the same
    with pytest.raises(ValueError, match="is the folder of another job, which differs in ") as caught:
        job(tmp_path / "job", **options)
    assert differs in str(caught.value)


def test_other_weights_and_data_are_refused(tmp_path: Path) -> None:
    method, data = LRP("epsilon", target=Target("action_value", 0)), steps()
    Job(method, policy(), data, tmp_path / "job")
    with pytest.raises(ValueError, match=r"model\.weights"):
        Job(method, policy(seed=1), data, tmp_path / "job")
    data["observation"][50] += 1e-3
    with pytest.raises(ValueError, match=r"source\.digest"):
        Job(method, policy(), data, tmp_path / "job")


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="holds something else than a job of tdhook"):
        job(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_rows_that_cannot_be_explained_do_not_stop_the_others(tmp_path: Path) -> None:
    data = steps()
    data["observation"][40] = torch.nan
    done = job(tmp_path / "job", source=data)
    with pytest.raises(ValueError, match="rows 32 to 47: "):
        done.work()
    assert done.status().chunks_done == 6
    assert not list((tmp_path / "job" / "claims").iterdir())


def test_a_full_disk_stops_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = job(tmp_path / "job")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(done.folder, "write_rows", full)
        with pytest.raises(OSError, match="No space left"):
            done.work()
    assert done.status().chunks_done == 0 and not list((tmp_path / "job" / "claims").iterdir())
    assert done.work().finished


def test_too_little_room_is_said_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = job(tmp_path / "job")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 100))
    with pytest.raises(OSError, match=r"take 0.0 GiB, and the disk of .* keep less"):
        done.work()


def test_what_was_changed_on_the_disk_is_found(tmp_path: Path) -> None:
    done = job(tmp_path / "job", reduce=[Moments()])
    done.work()
    assert done.verify().ok and done.verify(3).again != ()
    path = tmp_path / "job" / "rows" / "attr" / "observation.memmap"
    data = bytearray(path.read_bytes())
    data[20 * 16] ^= 1  # of row 20
    path.write_bytes(data)
    assert done.verify().changed == (1,)
    note = tmp_path / "job" / "done" / "000000002.json"
    told = json.loads(note.read_text())
    told["crc32"]["attr.observation"] += 1
    note.write_text(json.dumps(told))
    found = done.verify(7)
    assert found.changed == (1, 2) and found.differ == (2,) and not found.ok


@pytest.mark.parametrize(
    "keep",
    ["all", "compressed", torch.bfloat16, Kept(summed=[-1])],
    ids=["all", "compressed", "halved", "summed"],
)
def test_what_is_kept(keep: Any, tmp_path: Path) -> None:
    done = job(tmp_path / "job", keep=keep, rows=slice(0, 50))
    assert done.work().finished
    whole = rows_of(job(tmp_path / "whole", rows=slice(0, 50)))[ATTR]
    result = done.result()
    if keep == "compressed":
        blocks = result.blocks()
        assert len(blocks) == 50 and torch.equal(blocks[0:50][ATTR], whole)
        assert torch.equal(blocks[-1][ATTR], whole[-1]) and torch.equal(blocks[20:40:7][ATTR], whole[20:40:7])
        with pytest.raises(RuntimeError, match=r"read them by \.blocks\(\)"):
            _ = result.rows
        with pytest.raises(IndexError, match="there is no row 50 of 50"):
            blocks[50]
        return
    expected = {"all": whole, torch.bfloat16: whole.bfloat16()}.get(keep, whole.sum(-1))
    found = result.rows[ATTR]
    assert found.dtype == expected.dtype and torch.equal(found, expected)
    with pytest.raises(RuntimeError, match=r"they are in \.rows"):
        result.blocks()


def test_blocks_that_are_not_there(tmp_path: Path) -> None:
    done = job(tmp_path / "job", keep="compressed")
    chunks: list[int] = []
    done.work(on_done=chunks.append, until=lambda: len(chunks) == 1)
    blocks = done.result(partial=True).blocks()
    assert blocks[0:16].batch_size == (16,)
    with pytest.raises(RuntimeError, match="rows 16 to 31 are not explained yet"):
        blocks[15:17]


def test_nothing_kept_and_nothing_reduced(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no result: give keep= or reduce="):
        job(tmp_path / "job", keep=None)
    done = job(tmp_path / "job", keep=None, reduce=[Moments()])
    assert done.work().finished and not (tmp_path / "job" / "rows").exists()
    assert done.result().reduced["moments"]["count"].tolist() == [100]
    with pytest.raises(RuntimeError, match=r"what they were reduced to is in \.reduced"):
        _ = done.result().rows


@pytest.mark.parametrize("wrong", [Moments("nope"), Moments(by="nope"), Moments(by="observation")])
def test_nothing_is_written_of_what_cannot_be_reduced(wrong: Moments, tmp_path: Path) -> None:
    """So that the folder is there for what was meant."""
    with pytest.raises((KeyError, ValueError), match="the reducer 'moments'"):
        job(tmp_path / "job", reduce=[wrong])
    assert not (tmp_path / "job").exists()
    assert job(tmp_path / "job", reduce=[Moments()]).work().finished


def test_what_is_explained_is_left_as_it_was(tmp_path: Path) -> None:
    model, data = policy().train(), steps()
    weights = {name: x.clone() for name, x in model.state_dict().items()}
    before, threads = data.clone(), torch.get_num_threads()
    torch.manual_seed(3)
    drawn = torch.rand(3)
    torch.manual_seed(3)
    Job(LRP("epsilon", target=Target("action_value", 0)), model, data, tmp_path / "job", threads=2).work()
    assert torch.equal(torch.rand(3), drawn) and torch.get_num_threads() == threads
    assert model.training and all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())
    assert bool((data == before).all()) and {*data.keys(True, True)} == {*before.keys(True, True)}


def test_numbers_that_are_none(tmp_path: Path) -> None:
    for name in ("chunk", "threads", "at_once"):
        with pytest.raises(ValueError, match=f"{name} is at least 1, got {name}=0"):
            job(tmp_path / "job", **{name: 0})
    with pytest.raises(ValueError, match="not both"):
        job(tmp_path / "job", trajectories=True, in_order=True)


def test_compiled_equals_eager(tmp_path: Path) -> None:
    method = LRP(
        "epsilon_plus", target=Target("action_value", 0), compile={"backend": "aot_eager", "fullgraph": True}
    )
    plain = LRP("epsilon_plus", target=Target("action_value", 0))
    torch.testing.assert_close(
        rows_of(job(tmp_path / "graph", method))[ATTR], rows_of(job(tmp_path / "plain", plain))[ATTR]
    )


def test_weights_that_are_elsewhere(tmp_path: Path) -> None:
    model = policy()
    model.module[0].weight = nn.Parameter(torch.empty(16, 4, device="meta"))
    with pytest.raises(NotImplementedError, match="load the policy whole"):
        Job(LRP("epsilon", target=Target("action_value", 0)), model, steps(), tmp_path / "job")
    assert not (tmp_path / "job").exists()


def test_chunks_of_several_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = rows_of(job(tmp_path / "whole", chunk=40))
    for name in ("_SMALLEST", "_LARGEST"):
        monkeypatch.setattr(f"tdhook.datasets.chunks.{name}", 8)
    done = job(tmp_path / "job", chunk=40)
    assert done.chunks.piece == 8
    torch.testing.assert_close(rows_of(done)[ATTR], expected[ATTR])
    assert done.verify(3).ok
