"""The tables of "Coming from ..." name what there is here (what there is there: tests/peers/test_pages.py)."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path
from pkgutil import resolve_name

import pytest

from tdhook import LRP

PAGES = sorted((Path(__file__).parents[2] / "docs" / "coming-from").glob("*.md"))
HOMES = (
    "tdhook", "tdhook.attribution", "tdhook.rules", "tdhook.composites", "tdhook.selectors", "tdhook.targets",
    "tdhook.evaluation", "tdhook.models.families",
)  # fmt: skip


def ours(page: Path) -> list[str]:
    """The code in the second columns of a page's tables."""
    rows = [line.split(" | ")[1] for line in page.read_text().splitlines() if line.startswith("| ")]
    return re.findall(r"`([^`]+)`", " ".join(rows))


def known(name: str) -> bool:
    return any(name in importlib.import_module(home).__all__ for home in HOMES)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_is_said_to_be_here_is_here(page: Path) -> None:
    assert ours(page)
    for code in ours(page):
        if code.startswith("tdhook."):
            assert resolve_name(code) is not None
            continue
        try:
            tree = ast.parse(code, mode="eval")
        except SyntaxError:
            continue  # a keyword by itself
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert known(node.func.id), code
                if node.func.id == "LRP":  # made of constants: it can be made
                    eval(ast.unparse(node), {"LRP": LRP})  # noqa: S307
            elif isinstance(node, ast.Name) and node.id[0].isupper():
                assert known(node.id), code
