"""An explained policy acts in torchrl's collectors that are on several machines."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torchrl")

import tdhook

SCRIPT = Path(__file__).with_name("a_collector.py")


def shares_of(kind: str) -> list[list[float]]:
    """Of each batch, which share of its steps has the relevance of which weights, the first ones first."""
    path = os.pathsep.join([str(Path(tdhook.__file__).parents[1]), str(SCRIPT.parent)])
    done = subprocess.run(
        [sys.executable, SCRIPT, kind],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    told = next(line for line in done.stdout.splitlines() if line.startswith("shares: "))
    found: list[list[float]] = ast.literal_eval(told.removeprefix("shares: "))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["together", "remote"])
def test_each_batch_is_explained_by_the_weights_of_the_moment(kind: str) -> None:
    assert shares_of(kind) == [[0.0] * i + [1.0] for i in range(4)]


@pytest.mark.slow
def test_workers_that_do_not_wait_know_newer_weights_by_and_by() -> None:
    shares = shares_of("apart")
    # A step that falls together with an update may see some of the old weights and some of the new.
    assert shares[0] == [1.0] and sum(map(sum, shares)) > 3
    assert any(sum(one[1:]) > 0 for one in shares)
