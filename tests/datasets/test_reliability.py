"""Whoever dies, sleeps or comes late: the folder comes out the same, byte by byte."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from a_job import SECONDS, a_job, same, steps
from forking import ended, forked, killed, put_to_sleep

from tdhook.datasets import Place
from tdhook.datasets.folder import JobFolder

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")

SMALL = 70
"""Rows: five chunks."""
KEEP = ["all", "compressed"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder that one process has written without interruption."""
    made: dict[object, Path] = {}

    def written(count: int, keep: str = "all") -> Path:
        if (count, keep) not in made:
            home = tmp_path_factory.mktemp("whole") / "job"
            assert a_job(home, steps(count), keep=keep).work().finished
            made[count, keep] = home
        return made[count, keep]

    return written


def looks_well(home: Path, expected: Path) -> None:
    same(home, expected)
    assert [path.name for path in home.rglob("*") if ".writing" in path.name] == []


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SECONDS, "0.004")


def kill_and_go_on(home: Path, expected: Path, kills: int, chance: random.Random) -> int:
    """Kill workers at random moments until so many are, or all is done."""
    source, done = steps(), 0
    looks = a_job(home, source)
    while done < kills and not looks.status().finished:
        team = [forked(lambda: a_job(home, source).work()) for _ in range(chance.randint(1, 2))]
        time.sleep(chance.uniform(0.05, 0.4))
        for process in team:
            os.kill(process, signal.SIGKILL)
        done += [ended(process) for process in team].count(-signal.SIGKILL)
        partial = looks.result(partial=True)
        assert bool(partial.done.any()) == (looks.status().done > 0)
    assert a_job(home, source).work().finished
    looks_well(home, expected)
    assert looks.verify().ok
    return done


@pytest.mark.usefixtures("slow")
def test_killed_at_random_moments(whole: Callable[..., Path], tmp_path: Path) -> None:
    assert kill_and_go_on(tmp_path / "job", whole(600), 6, random.Random(0)) >= 2


@pytest.mark.slow
@pytest.mark.usefixtures("slow")
def test_killed_at_many_random_moments(whole: Callable[..., Path], tmp_path: Path) -> None:
    chance, kills, jobs = random.Random(1), 0, 0
    while kills < 60:
        kills += kill_and_go_on(tmp_path / str(jobs), whole(600), 60 - kills, chance)
        jobs += 1


def kill_at(moment: int, home: Path, expected: Path, keep: str) -> bool:
    """Kill a worker just before it does its so manieth thing to the folder; whether it did so many."""
    source = steps(SMALL)

    def work() -> None:
        killed(moment, str(home))
        a_job(home, source, keep=keep).work()

    code = ended(forked(work))
    assert code in (0, -signal.SIGKILL)
    job = a_job(home, source, keep=keep)
    status = job.work()
    assert status.finished and job.verify().ok
    looks_well(home, expected)
    return code != 0


def wake_at(moment: int, home: Path, expected: Path, keep: str) -> bool:
    """Have a worker sleep in the middle of something, until others have done all, and wake it."""
    source = steps(SMALL)

    def work() -> None:
        job = a_job(home, source, keep=keep)
        put_to_sleep(moment, str(home))
        job.work()

    process = forked(work)
    _, status = os.waitpid(process, os.WUNTRACED)
    sleeps = os.WIFSTOPPED(status)
    job = a_job(home, source, keep=keep, lease=0.05)
    assert job.work().finished
    result = job.result()
    if sleeps:
        os.kill(process, signal.SIGCONT)
        assert ended(process) == 0
    assert job.status().finished and job.verify().ok
    assert bool(result.done.all())
    looks_well(home, expected)
    return sleeps


@pytest.mark.parametrize("keep", KEEP)
@pytest.mark.parametrize("happens", [kill_at, wake_at])
def test_at_some_moments(
    happens: Callable[[int, Path, Path, str], bool], keep: str, whole: Callable[..., Path], tmp_path: Path
) -> None:
    for moment in range(3, 80, 13):
        happens(moment, tmp_path / str(moment), whole(SMALL, keep), keep)


@pytest.mark.slow
@pytest.mark.parametrize("keep", KEEP)
@pytest.mark.parametrize("happens", [kill_at, wake_at])
def test_at_each_moment(
    happens: Callable[[int, Path, Path, str], bool], keep: str, whole: Callable[..., Path], tmp_path: Path
) -> None:
    moment = 1 + KEEP.index(keep)  # each moment in one of the two
    while happens(moment, tmp_path / str(moment), whole(SMALL, keep), keep):
        moment += 2
    assert moment > 60


def test_all_begin_at_once(whole: Callable[..., Path], tmp_path: Path) -> None:
    source = steps(SMALL)
    for i in range(4):
        home = tmp_path / str(i)
        begin = time.monotonic() + 0.2

        def work(home: Path = home, begin: float = begin) -> None:
            time.sleep(max(0.0, begin - time.monotonic()))
            a_job(home, source).work(place=Place())

        assert [ended(process) for process in [forked(work) for _ in range(4)]] == [0] * 4
        looks_well(home, whole(SMALL))


def test_another_begins_between_two_looks(whole: Callable[..., Path], tmp_path: Path) -> None:
    home = tmp_path / "job"
    look = JobFolder._holds_something_else

    def late(folder: JobFolder) -> bool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(JobFolder, "_holds_something_else", look)
            assert a_job(home, steps(SMALL)).work().finished
        return look(folder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JobFolder, "_holds_something_else", late)
        assert a_job(home, steps(SMALL)).work().finished
    looks_well(home, whole(SMALL))


def test_what_is_swept_away_is_written_again(tmp_path: Path) -> None:
    home = tmp_path / "job"
    job = a_job(home, steps(SMALL))
    assert job.work().finished
    folder, swept = JobFolder(home), []
    write = folder._write

    def write_and_lose(path: Path, data: bytes) -> None:
        write(path, data)
        if len(swept) < 2:
            job.folder.finish_rows()
            swept.append(path)
            assert not path.exists()

    folder._write = write_and_lose  # type: ignore[method-assign]
    folder.note(folder.done / "000000001.json", {"rows": [0, 1]})
    assert len(swept) == 2 and folder.is_done(1)
