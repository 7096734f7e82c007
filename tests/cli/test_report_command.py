"""`tdhook report` makes a page of what other commands wrote."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from reports import Elements, rollout

pytest.importorskip("typer")
pytest.importorskip("torchrl")
pytest.importorskip("matplotlib")

from typer.testing import CliRunner, Result

from tdhook.cli.commands import app


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "path", [*sys.path])


def tdhook(*arguments: str) -> Result:
    return CliRunner().invoke(app, [*arguments], prog_name="tdhook")


def test_it_makes_a_page_of_what_demo_wrote() -> None:
    assert tdhook("demo", "--steps", "5", "--out", "out").exit_code == 0
    result = tdhook("report", "out")
    assert result.exit_code == 0, result.output
    assert re.fullmatch(r"wrote out/report.html \(0.\d MB\)\n", result.output)
    page = Path("out/report.html").read_text(encoding="utf-8")
    words = Elements(page).words
    assert "CartPole-v1: relevance for action_value:action under epsilon_plus" in words
    assert "pole angular velocity" in words and "Conservation error: " in words
    assert "seed 0" in words and "EpsilonRule()" in words


def test_it_has_every_key_and_output() -> None:
    explain = ("explain", "--policy", "cli_policies:cartpole", "--env", "CartPole-v1")
    what = ("--target", "scores:all", "--attribute", "hidden", "--steps", "3", "--out", "out")
    assert tdhook(*explain, *what).exit_code == 0
    result = tdhook("report", "out", "--out", "elsewhere/why.html")
    assert result.exit_code == 0, result.output
    data = json.loads(Elements(Path("elsewhere/why.html").read_text(encoding="utf-8")).scripts[0])
    labels = [view["label"] for view in data["views"]]
    assert labels == [f"{key}, action {i}" for key in ("observation", "hidden") for i in range(2)]


def test_mistakes_end_in_one_line() -> None:
    Path("empty").mkdir()
    Path("odd/rollout").mkdir(parents=True)
    Path("odd/summary.json").write_text("{}")
    rollout(2).memmap("odd/rollout")
    for folder, message in (
        ("empty", "error: empty is no output folder of tdhook"),
        ("odd", "error: odd/summary.json is not as tdhook writes it: KeyError"),
    ):
        result = tdhook("report", folder)
        assert result.exit_code == 2
        assert result.stderr.startswith(message), result.stderr
