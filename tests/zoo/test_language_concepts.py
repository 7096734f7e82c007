"""The script examples/language_concepts.py: neurons of the language policy stand for directions."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest
from torchvision_shim import import_torchvision

import_torchvision()  # some classes of transformers need it
pytest.importorskip("transformers", reason="transformers is not installed; `nox -s zoo` installs it")

pytestmark = pytest.mark.zoo

SCRIPT = Path(__file__).parents[2] / "examples" / "language_concepts.py"
LINE = re.compile(
    r"^ *(north|south|east|west): neuron +(\d+), mean relevance \+(\d\.\d+), at (.*)$", re.MULTILINE
)


@pytest.mark.filterwarnings("ignore:input '(mask|answer|never)' is torch.int64")
def test_each_neuron_stands_for_the_answer_that_it_speaks_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["language_concepts.py", "--out", str(tmp_path / "page.html")])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    found = LINE.findall(capsys.readouterr().out)
    assert [way for way, *_ in found] == [way for way in ("north", "south", "east", "west") for _ in range(3)]
    assert len({unit for _, unit, *_ in found}) == 12
    for way, _, mean, places in found:
        assert set(places.split(", ")) == {way} and float(mean) > 0.05
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count('class="words"') == 48 and "2,000 steps, 64 units" in page
