"""Each promise of the page of guarantees names tests that are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "guarantees.md").read_text()
NAMED = sorted(set(re.findall(r"`(tests/[\w./]+(?:::\w+)?)`", PAGE)))


def test_every_promise_names_a_test() -> None:
    rows = [
        line
        for line in PAGE.splitlines()
        if line.startswith("| ") and not line.startswith(("| promise", "| ---"))
    ]
    assert len(rows) > 30
    for row in rows:
        assert re.search(r"`tests/", row), row


@pytest.mark.parametrize("named", NAMED)
def test_the_test_is_there(named: str) -> None:
    path, _, name = named.partition("::")
    place = ROOT / path
    assert place.exists()
    files = [place] if place.is_file() else sorted(place.rglob("test_*.py"))
    pattern = rf"^def {name}\(" if name else r"^def test_"
    assert any(re.search(pattern, file.read_text(), re.MULTILINE) for file in files)
