"""The script examples/language_effects.py, and the page that shows what it prints."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
from torchvision_shim import import_torchvision

import_torchvision()  # some classes of transformers need it
pytest.importorskip("transformers", reason="transformers is not installed; `nox -s zoo` installs it")

pytestmark = pytest.mark.zoo

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "language_effects.py"
PAGE = ROOT / "docs" / "explain" / "effects.md"
NUMBER = re.compile(r"-?\d+\.\d\d\b")


def test_the_script_prints_what_the_page_shows(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(SCRIPT), run_name="__main__")
    printed = capsys.readouterr().out
    (shown,) = re.findall(r"^```text\n( +the two words.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    names = [re.sub(r"\s+", " ", NUMBER.sub("#", text)).strip() for text in (printed, shown)]
    assert names[0] == names[1]
    numbers = [[float(number) for number in NUMBER.findall(text)] for text in (printed, shown)]
    # The last digit may be rounded otherwise on another processor.
    assert numbers[0] == pytest.approx(numbers[1], abs=1.01e-2, rel=0)
