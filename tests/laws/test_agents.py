"""Each script of ``examples/agents`` explains its agent from the checkpoint that is there."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

AGENTS = Path(__file__).parents[2] / "examples" / "agents"
SCRIPTS = sorted(path.stem for path in AGENTS.glob("*.py") if "__main__" in path.read_text(encoding="utf-8"))
HIDDEN = {"ppo": ["Box2D"], "multiagent": ["vmas"], "transformer": ["transformers"]}
"""What gymnasium and torchrl import for a script."""
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


def missing(name: str) -> list[str]:
    """Packages that a script needs and that are not installed."""
    tree = ast.parse((AGENTS / f"{name}.py").read_text(encoding="utf-8"))
    roots = set(HIDDEN.get(name, ()))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            roots |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            roots.add(node.module.partition(".")[0])
    siblings = {path.stem for path in AGENTS.glob("*.py")}
    return sorted(root for root in roots - siblings if importlib.util.find_spec(root) is None)


MISSING = sorted({package for name in SCRIPTS for package in missing(name)})


@pytest.mark.slow
@pytest.mark.skipif(
    bool(MISSING),
    reason=f"{', '.join(MISSING)} not installed: `nox -s examples` installs what the scripts need",
)
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_explains_its_agent(name: str, tmp_path: Path) -> None:
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
