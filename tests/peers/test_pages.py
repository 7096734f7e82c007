"""The pages "Coming from ..." name what there is in the other library."""

from __future__ import annotations

import re
from pathlib import Path
from pkgutil import resolve_name

import pytest

pytestmark = pytest.mark.peers

PAGES = Path(__file__).parents[2] / "docs" / "coming-from"


@pytest.mark.parametrize("library", ["zennit", "captum", "lxt"])
def test_what_is_said_to_be_there_is_there(library: str) -> None:
    pytest.importorskip(library, reason=f"{library} is not installed")
    if library == "lxt":
        pytest.importorskip("transformers", reason="LXT needs it for the classes that it patches")
    names = re.findall(rf"`({library}(?:\.\w+)+)`", (PAGES / f"{library}.md").read_text())
    assert len(names) > 10
    for name in names:
        assert resolve_name(name) is not None
