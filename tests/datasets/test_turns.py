"""However many workers there are, and whatever happens to them, little time is lost, by the library's own turns."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.swarm import CASES, Case, simulate

FEW = Case("few", workers=100, machines=20, chunks=6000)


@pytest.mark.parametrize(
    "changed",
    [{}, {"placed": False}, {"slow": 0.05}, {"deaths": 0.05}, {"slow": 0.05, "deaths": 0.05}],
    ids=str,
)
def test_little_time_is_lost(changed: dict[str, float]) -> None:
    found = simulate(replace(FEW, **changed))
    assert found.efficiency > 0.95
    assert found.twice < 0.02 * FEW.chunks


def test_slow_workers_hold_nobody_up() -> None:
    """Their last chunks are done beside them, and they stop at the next stretch of rows: a sixteenth of the time."""
    found = simulate(replace(FEW, slow=0.05, times=50.0))
    assert found.efficiency > 0.9


def test_all_but_one_machine_die() -> None:
    found = simulate(replace(FEW, chunks=500, machines=10, workers=20, deaths=0.9))
    assert found.efficiency > 0.8


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES[2:4], ids=lambda case: case.name)
def test_a_thousand_workers(case: Case) -> None:
    assert simulate(case).efficiency > 0.95
