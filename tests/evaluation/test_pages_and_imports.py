"""What the documentation says was measured, and what an import loads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tdhook.evaluation import as_markdown

ROOT = Path(__file__).parents[2]


def test_the_tables_of_the_page_are_the_figures_of_the_script() -> None:
    page = (ROOT / "docs" / "show-and-test" / "evaluation.md").read_text()
    measured = json.loads((ROOT / "examples" / "evaluation.json").read_text())
    assert measured
    for agent in measured.values():
        assert agent["what"] in page
        assert as_markdown(agent["rows"], digits=3) in page


def test_the_measures_need_neither_torchrl_nor_numpy_to_be_imported() -> None:
    script = (
        "import sys, torch, tensordict; before = set(sys.modules); import tdhook.evaluation; "
        "added = {name.partition('.')[0] for name in set(sys.modules) - before}; "
        "print(sorted(added - {'tdhook', *sys.stdlib_module_names}))"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (run.returncode, run.stdout.strip()) == (0, "[]"), run.stderr
