"""Many processes on one machine, started by this library or by a launcher, write what one process writes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from a_job import HURRY, SECONDS, a_job, same, steps
from forking import ended, forked
from torch import nn

import tdhook
from tdhook.datasets import Place, launch
from tdhook.datasets.launching import cores
from tdhook.datasets.result import Status
from tdhook.datasets.units import Units

SCRIPT = Path(__file__).with_name("a_worker.py")
HERE = {**os.environ, "PYTHONPATH": str(Path(tdhook.__file__).parents[1]), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that one process has written."""
    home = tmp_path_factory.mktemp("alone") / "job"
    assert a_job(home).work().finished
    return home


def test_workers_write_the_same_bytes(alone: Path, tmp_path: Path) -> None:
    seen: list[Status] = []
    job = a_job(tmp_path / "job")
    status = launch(job, 2, on_progress=seen.append, every=0.01)
    assert status.finished and seen[-1] == status
    assert [one.done for one in seen] == sorted(one.done for one in seen)
    same(tmp_path / "job", alone)
    assert job.verify(5).ok and list((tmp_path / "job" / "claims").iterdir()) == []
    workers = {path.name.rpartition("-")[0] for path in (tmp_path / "job" / "workers").iterdir()}
    assert len(workers) == 2
    assert launch(job) == status  # nothing is left


def test_an_error_of_a_worker_comes_back(tmp_path: Path) -> None:
    data = steps()
    data["observation"][40] = torch.nan
    with pytest.raises(ValueError, match="rows 32 to 47: ") as caught:
        launch(a_job(tmp_path / "job", data), 1)
    assert "in worker 0 of 1:\nTraceback" in str(caught.value.__cause__)
    assert a_job(tmp_path / "job", data).status().chunks_done == 37


class Kept(nn.Module):
    """Cannot be sent anywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)

    def __getstate__(self) -> object:
        raise TypeError("it holds a handle")


def test_what_cannot_be_sent_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = a_job(tmp_path / "job")
    monkeypatch.setattr(job.chunks.explaining, "model", Kept())
    with pytest.raises(TypeError, match=r"cannot be sent to other processes: it holds a handle\..*torchrun"):
        launch(job, 1)


def test_numbers_of_workers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="workers is at least 1, got workers=0"):
        launch(a_job(tmp_path / "job"), 0)
    assert 1 <= cores() <= (os.cpu_count() or 1)


@pytest.mark.parametrize(
    "environment, place",
    [
        ({}, Place()),
        ({"RANK": "3", "WORLD_SIZE": "8"}, Place(3, 8)),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "4"}, Place(1, 4)),
        (
            {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "5", "SLURM_ARRAY_TASK_MIN": "5"},
            Place(2, 5),
        ),
        ({"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "3"}, Place(2, 3)),
        ({"RANK": "9", "WORLD_SIZE": "8"}, Place()),
        ({"RANK": "a", "WORLD_SIZE": "8", "SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, Place(0, 2)),
    ],
)
def test_a_launcher_says_the_place(environment: dict[str, str], place: Place) -> None:
    assert Place.here(environment) == place


def test_places_share_the_chunks() -> None:
    units = Units(1000, 10)
    assert [*Place(1, 4).order(units)][:3] == [25, 26, 27]
    assert sorted(Place(3, 4).order(units)) == [*range(100)]
    parts = [[*Place(i, 3, alone=True).order(units)] for i in range(3)]
    assert [unit for part in parts for unit in part] == [*range(100)]
    assert Place(1, 4).among(1, 2) == Place(3, 8)
    inner = [[*Place(1, 3, alone=True).among(i, 2).order(units)] for i in range(2)]
    assert [sorted(one) for one in inner] == [parts[1]] * 2 and inner[0][0] != inner[1][0]
    with pytest.raises(ValueError, match="got 4 of 4"):
        Place(4, 4)


def started(*command: str | Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*map(str, command)],
        env={**HERE, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def said(*processes: subprocess.Popen[str]) -> list[str]:
    texts = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), texts
    return texts


@pytest.mark.slow
def test_torchrun(alone: Path, tmp_path: Path) -> None:
    run = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    [text] = said(started(*run, SCRIPT, tmp_path / "job"))
    assert text.count("38 of 38, process group: False") == 2
    same(tmp_path / "job", alone)


@pytest.mark.slow
def test_a_slurm_array(alone: Path, tmp_path: Path) -> None:
    tasks = [
        started(
            sys.executable,
            SCRIPT,
            tmp_path / "job",
            SLURM_ARRAY_TASK_ID=str(i),
            SLURM_ARRAY_TASK_COUNT="2",
            SLURM_ARRAY_TASK_MIN="1",
        )
        for i in (1, 2)
    ]
    said(*tasks)
    same(tmp_path / "job", alone)


LAUNCHES = """
import sys
from a_job import a_job
from tdhook.datasets import launch

launch(a_job(sys.argv[1]), 1)
"""


def until(holds: Callable[[], bool], seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.02)


def processes_of(folder: Path) -> list[int]:
    """The processes that have worked on a job."""
    paths = (folder / "workers").glob("*.json")
    return [int(path.stem.split("-")[-2]) for path in paths]


def is_there(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, *(pytest.param(one, marks=pytest.mark.slow) for one in (signal.SIGINT, signal.SIGKILL))],
)
def test_whoever_stops_the_launch_stops_all(
    number: int, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, note = tmp_path / "job", tmp_path / "note"
    monkeypatch.setenv(SECONDS, "0.3")

    def told(status: Status) -> None:
        if status.chunks_done:
            note.touch()

    def launches() -> None:
        # Where the tests run in the background of a shell, this is ignored, and so by all that they start.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        launch(a_job(home), 2, on_progress=told, every=0.05)

    process = forked(launches)
    until(note.exists)
    os.kill(process, number)
    assert ended(process) != 0
    until(lambda: not any(map(is_there, processes_of(home))), 20)
    if number != signal.SIGKILL:
        assert list((home / "claims").iterdir()) == []
        assert [one for one in home.iterdir() if one.name.startswith(".")] == []
    monkeypatch.delenv(SECONDS)
    done = a_job(home).status().chunks_done
    assert 0 < done < 38
    assert a_job(home).work().finished
    same(home, alone)


def test_a_worker_that_dies_is_told_of(alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, hurry, killed = tmp_path / "job", tmp_path / "hurry", []
    monkeypatch.setenv(SECONDS, "0.1")
    monkeypatch.setenv(HURRY, str(hurry))

    def kill_one(status: Status) -> None:
        at_work = [one for one in processes_of(home) if is_there(one)]
        if status.chunks_done and len(at_work) == 2 and not killed:
            os.kill(at_work[0], signal.SIGKILL)
            killed.append(at_work[0])
            hurry.touch()

    with pytest.warns(
        UserWarning, match=r"worker \d of 2 was ended by SIGKILL.*: others have done its chunks"
    ):
        status = launch(a_job(home), 2, on_progress=kill_one, every=0.05)
    assert killed and status.finished
    same(home, alone)


def test_a_script_without_a_guard_is_told_what_it_lacks(tmp_path: Path) -> None:
    script = tmp_path / "launches.py"
    script.write_text(LAUNCHES)
    path = os.pathsep.join([HERE["PYTHONPATH"], str(SCRIPT.parent)])
    process = started(sys.executable, script, tmp_path / "job", PYTHONPATH=path)
    text = process.communicate(timeout=300)[0]
    assert process.returncode == 1
    assert "38 chunks are left, as worker 0 of 1 ended with code 1 before it began" in text
    assert 'under `if __name__ == "__main__":`' in text


def test_no_network(alone: Path, tmp_path: Path) -> None:
    for how in (["unshare", "-rn"], ["unshare", "-n"]):
        if not subprocess.run([*how, "true"], capture_output=True).returncode:
            said(started(*how, sys.executable, SCRIPT, tmp_path / "job"))
            return same(tmp_path / "job", alone)
    pytest.skip("no network namespace may be made here")
