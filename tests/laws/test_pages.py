"""The Python that README and documentation show runs: each page, top to bottom, as one program.

(Examples in docstrings, and those in a page's `{doctest}` blocks, are run by `nox -s docs`.)
"""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```(python|pycon)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def pages() -> list[Path]:
    built = ROOT / "docs" / "_build"
    return [page for page in sorted((ROOT / "docs").rglob("*.md")) if built not in page.parents]


def pages_with_python() -> list[str]:
    all_pages = [ROOT / "README.md", *pages()]
    return [str(page.relative_to(ROOT)) for page in all_pages if BLOCK.search(page.read_text())]


def slug(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def test_the_readme_shows_python() -> None:
    assert "README.md" in pages_with_python()


def test_a_page_is_found_by_its_title() -> None:
    for page in pages():
        title = page.read_text().partition("\n")[0].removeprefix("# ")
        if page.name != "index.md" and not title.startswith("```"):
            names = {page.stem, f"{page.parent.name}-{page.stem}", f"tdhook-{page.stem}"}
            assert slug(title) in names, f"{page}: {title}"


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_what_a_page_outside_the_documentation_links_to_is_there(page: str) -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", (ROOT / page).read_text())
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


@pytest.mark.parametrize("page", pages_with_python())
def test_the_python_of_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # what an example writes goes where it is in nobody's way
    text = (ROOT / page).read_text()
    names: dict[str, object] = {"__name__": "__main__"}
    for block in BLOCK.finditer(text):
        language, source = block.groups()
        line = text.count("\n", 0, block.start(2))
        if language == "pycon":
            example = doctest.DocTestParser().get_doctest(source, names, page, page, line)
            runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
            assert runner.run(example, clear_globs=False).failed == 0, f"{page}, line {line}: see the output"
            names = example.globs
        else:
            # Blank lines first, so that a traceback shows the page's line.
            exec(compile("\n" * line + source, str(ROOT / page), "exec"), names)  # noqa: S102
