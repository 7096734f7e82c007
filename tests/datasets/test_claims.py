"""Claims are those of workers that live, by the clock of whoever looks."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from a_job import a_job, same, steps

from tdhook.datasets.claims import ClaimFiles, Claims, Worker, is_gone, this_worker

ELSEWHERE = Worker("far", "another machine", 1, "123")


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def claims(home: Path, worker: Worker | None = None, lease: float = 10.0) -> tuple[Claims, Clock]:
    clock = Clock()
    worker = this_worker() if worker is None else worker
    return Claims(ClaimFiles(home, worker.name), worker, lease, clock), clock


def test_a_chunk_has_one_claim(tmp_path: Path) -> None:
    ours, _ = claims(tmp_path)
    theirs, _ = claims(tmp_path)
    assert ours.take(3) and not theirs.take(3) and not ours.take(3)
    assert theirs.held() == {3}
    assert theirs.take(3, second=True) and not ours.take(3, second=True)
    assert theirs.held() == {3}
    ours.release(3)
    assert theirs.take(3)
    theirs.release(3)
    assert list(tmp_path.iterdir()) == []


def test_only_ones_own_claim_is_let_go(tmp_path: Path) -> None:
    ours, _ = claims(tmp_path)
    theirs, _ = claims(tmp_path)
    assert theirs.take(1)
    before = theirs.board.look("000000001.claim")
    ours.touch(1)
    ours.release(1)
    assert theirs.board.look("000000001.claim") == before


def test_of_a_dead_process_the_system_knows(tmp_path: Path) -> None:
    dead = replace(this_worker(), name="dead", started="1")
    theirs, _ = claims(tmp_path, dead)
    ours, _ = claims(tmp_path)
    assert theirs.take(2)
    assert ours.is_stale(2) and ours.take(2)
    none = replace(this_worker(), process=2**22 + 1)
    assert is_gone(this_worker(), json.dumps(none.as_data()))
    assert not is_gone(this_worker(), json.dumps(this_worker().as_data()))
    assert not is_gone(this_worker(), json.dumps(ELSEWHERE.as_data()))
    assert not is_gone(this_worker(), "{") and not is_gone(this_worker(), "[]")


@pytest.mark.parametrize("stamp", [0, 2**33, None], ids=["long ago", "to come", "now"])
def test_clocks_of_machines_may_differ(stamp: int | None, tmp_path: Path) -> None:
    theirs, _ = claims(tmp_path, ELSEWHERE)
    ours, clock = claims(tmp_path)
    assert theirs.take(0)
    path = tmp_path / "000000000.claim"
    if stamp is not None:
        os.utime(path, (stamp, stamp))
    for _ in range(5):  # it lives: its file changes
        clock.now += 8
        assert not ours.take(0)
        there = path.stat().st_mtime_ns + 1000
        os.utime(path, ns=(there, there))
    clock.now += 8
    assert not ours.take(0)
    clock.now += 9
    assert not ours.is_stale(0)
    clock.now += 2
    assert ours.is_stale(0) and ours.take(0)


def test_what_another_has_just_taken_over_is_not_taken_away(tmp_path: Path) -> None:
    theirs, _ = claims(tmp_path, ELSEWHERE)
    ours, _ = claims(tmp_path)
    assert theirs.take(0)
    old = theirs.board.look("000000000.claim")
    assert old is not None
    theirs.release(0)
    third, _ = claims(tmp_path, replace(ELSEWHERE, name="third", process=2))
    assert third.take(0)
    ours.board.remove("000000000.claim", old[1])  # as of a worker that judged before
    assert third.held() == {0} and len(list(tmp_path.iterdir())) == 1


def test_a_system_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object, **__: object) -> None:
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", none)
    ours, _ = claims(tmp_path)
    theirs, _ = claims(tmp_path)
    assert ours.take(1) and not theirs.take(1)
    ours.release(1)
    assert theirs.take(1)


def test_a_worker_touches_what_it_holds(tmp_path: Path) -> None:
    import time

    worker = this_worker()
    ours = Claims(ClaimFiles(tmp_path, worker.name), worker, 0.04)
    assert ours.take(0)
    os.utime(tmp_path / "000000000.claim", (1, 1))
    with ours.kept_alive(0):
        time.sleep(0.1)
    assert (tmp_path / "000000000.claim").stat().st_mtime > 1


def put(home: Path, unit: int, worker: Worker) -> None:
    (home / "claims" / f"{unit:09d}.claim").write_text(json.dumps(worker.as_data()))


@pytest.mark.parametrize("lease", [0.1, 60.0])
def test_a_machine_that_is_gone_holds_nothing_up(lease: float, tmp_path: Path) -> None:
    """Its lease runs out, or its chunk counts as slow."""
    home = tmp_path / "job"
    job = a_job(home, steps(70), lease=lease)
    for unit in (1, 3):
        put(home, unit, ELSEWHERE)
    assert job.status().at_work == 2 and job.status().abandoned == 0
    assert job.work().finished
    assert a_job(tmp_path / "whole", steps(70)).work().finished
    same(home, tmp_path / "whole")
    assert job.status().at_work == 0


def test_a_dead_worker_of_this_machine_holds_nothing_up(tmp_path: Path) -> None:
    home = tmp_path / "job"
    job = a_job(home, steps(70))
    put(home, 2, replace(this_worker(), started="1"))
    (home / "claims" / "000000003.claim").write_text("")  # cut off
    assert job.status().abandoned == 1
    assert job.work().finished
