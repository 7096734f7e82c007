"""Importing the package must cost next to nothing on top of torch and tensordict.

Time itself is no matter for a test (`python -m benchmarks.import_time` measures it). What is tested is its
cause: which modules an import adds to those that `import torch, tensordict` has loaded.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

ADDED = """
import json, sys
import torch, tensordict
before = set(sys.modules)
{statement}
print(json.dumps(sorted(set(sys.modules) - before)))
"""


def added_modules(statement: str) -> list[str]:
    script = ADDED.format(statement=statement)
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize(
    "statement",
    [
        "import tdhook",
        "from tdhook import LRP, Composite, Contrast, Key, Target, preset",
        "import tdhook.rules, tdhook.composites, tdhook.selectors, tdhook.targets",
    ],
)
def test_an_import_adds_nothing_but_the_package_itself_and_the_standard_library(statement: str) -> None:
    added = added_modules(statement)
    assert "tdhook" in added
    foreign = {name for name in added if name.partition(".")[0] not in {"tdhook", *sys.stdlib_module_names}}
    assert not foreign, f"`{statement}` also loads {sorted(foreign)}"


def test_importing_the_package_alone_loads_none_of_its_parts() -> None:
    assert [name for name in added_modules("import tdhook") if name.startswith("tdhook")] == ["tdhook"]
