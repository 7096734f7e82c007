"""The scripts of ``examples/large`` find what the model held whole has."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("accelerate") is None,
        reason="accelerate is not installed: `nox -s examples` installs what the scripts need",
    ),
]

LARGE = Path(__file__).parents[2] / "examples" / "large"


def output_of(*command: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=300, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_two_processes_explain_what_they_hold_together() -> None:
    run = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    said = output_of(*run, str(LARGE / "two_processes.py"))
    assert len(re.findall(r"e[-+]\d+ from the model held whole", said)) == 3


def test_what_lies_on_the_disk_is_explained() -> None:
    assert "from the model held in memory" in output_of(str(LARGE / "offloaded.py"))
