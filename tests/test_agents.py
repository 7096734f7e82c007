"""Each script of ``examples/agents`` explains its agent from the checkpoint that is there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

AGENTS = Path(__file__).parents[1] / "examples" / "agents"
SCRIPTS = sorted(path.stem for path in AGENTS.glob("*.py") if "__main__" in path.read_text(encoding="utf-8"))
PNG = b"\x89PNG\r\n\x1a\n"


def checkpoint_of(name: str) -> Path:
    return AGENTS / "checkpoints" / f"{name}.pt"


def test_there_are_scripts() -> None:
    assert {"dqn", "ppo", "sac", "td3"} <= set(SCRIPTS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_checkpoint_is_plain_data_with_its_facts(name: str) -> None:
    checkpoint = torch.load(checkpoint_of(name), map_location="cpu", weights_only=True)
    assert set(checkpoint) >= {"weights", "facts"} and checkpoint["facts"]


def test_checkpoints_are_small() -> None:
    assert sum(path.stat().st_size for path in (AGENTS / "checkpoints").glob("*.pt")) < 3e6


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_explains_its_agent(name: str, tmp_path: Path) -> None:
    pytest.importorskip("torchrl")
    before = checkpoint_of(name).read_bytes()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, str(AGENTS / f"{name}.py"), "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    told = re.search(r"^ledger gap: (\S+) of the target", done.stdout, re.MULTILINE)
    assert told is not None and float(told[1]) < 1e-4
    assert (tmp_path / f"{name}.png").read_bytes().startswith(PNG)
    assert checkpoint_of(name).read_bytes() == before
