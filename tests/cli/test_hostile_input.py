"""What users and those who send them files get wrong, or mean ill: one line, and no code is run."""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("torchrl")
pytest.importorskip("matplotlib")

from tensordict import TensorDict
from typer.testing import CliRunner, Result

import tdhook.cli.explanations as explanations
from tdhook.cli.commands import app
from tdhook.rl import Policy, build_actor, load_policy, save_policy

ARCHITECTURE = {"in_features": 4, "out_features": 2, "num_cells": [8], "activation": "ReLU"}
NAMES = ("$a$ $\\frac$", "_b\x1b[31m[/red]", "\ud800", "{{data}}</script>\n")
ACTIONS = ("[/bold]$x$", "_right\x00")


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    metadata = {"kind": "dqn_mlp", "architecture": ARCHITECTURE}
    actor = build_actor("dqn_mlp", ARCHITECTURE)
    save_policy(Policy(actor, "CartPole-v1", tuple("wxyz"), ("l", "r"), metadata), "p.pt")
    Path("evil.py").write_text("from pathlib import Path\nPath('code-ran').touch()")


def tdhook(*arguments: str) -> Result:
    return CliRunner().invoke(app, [*arguments], prog_name="tdhook")


def fails(*arguments: str) -> str:
    result = tdhook(*arguments)
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    return line


def changed(**entries: Any) -> None:
    torch.save({**torch.load("p.pt", weights_only=True), **entries}, "q.pt")


EXPLAIN = ("explain", "--steps", "3", "--policy", "q.pt", "--out", "out")


@pytest.mark.parametrize(
    "entries, message",
    [
        ({"env": "evil:CartPole-v1"}, "would import the module 'evil'"),
        ({"env": "evil:"}, "would import the module 'evil'"),
        ({"options": {"backend": "evil"}}, "its option 'backend' is 'evil'"),
        ({"options": {"a": [{"b": 1}]}}, "its option 'a'"),
        ({"options": {"a": "evil.thing"}}, "its option 'a' is 'evil.thing'"),
        ({"options": [1]}, "its 'options' are [1]"),
        ({"preprocessing": ["evil"]}, "its 'preprocessing' is ['evil']"),
        ({"env": 3}, "its 'env' is 3"),
        ({"features": [1, 2, 3, 4]}, "features[0] is 1, and a name is a string"),
        ({"features": ["x", "x", "y", "z"]}, "features have the name 'x' twice"),
        ({"actions": ["go", "go"]}, "actions have the name 'go' twice"),
    ],
)
@pytest.mark.parametrize("command", [EXPLAIN, ("plan", "--policy", "q.pt")])
def test_a_checkpoint_imports_nothing_and_is_told(
    entries: dict[str, Any], message: str, command: tuple[str, ...]
) -> None:
    changed(**entries)
    assert message in fails(*command)
    assert not Path("code-ran").exists() and "evil" not in sys.modules and not Path("out").exists()


def test_a_module_that_the_user_names_is_imported() -> None:
    changed(env="evil:CartPole-v1")
    assert load_policy("q.pt", "CartPole-v1").env_id == "CartPole-v1"
    assert tdhook("plan", "--policy", "q.pt", "--env", "evil:CartPole-v1").exit_code == 0
    assert Path("code-ran").exists()
    del sys.modules["evil"]


def test_names_are_shown_as_they_are() -> None:
    changed(features=list(NAMES), actions=list(ACTIONS))
    result = tdhook(*EXPLAIN, "--target", "action_value:all")
    assert result.exit_code == 0, result.output
    assert "\x1b" not in result.output and r"_b\x1b[31m[/red]" in result.output
    assert tdhook("report", "out").exit_code == 0
    page = Path("out/report.html").read_text(encoding="utf-8")
    for shown in ("$a$ $\\frac$", "{{data}}&lt;/script&gt;", r"\ud800", "[/bold]$x$"):
        assert shown in page
    told = json.loads(Path("out/summary.json").read_text())["explanations"]
    assert [tuple(part["mean_relevance"]) for part in told] == [NAMES] * 2
    assert tdhook("explain", "--steps", "3", "--policy", "p.pt", "--out", "out").exit_code == 0
    assert sorted(path.name for path in Path("out").iterdir()) == [
        *("manifest.json", "relevance.png", "rollout", "summary.json")
    ]


def test_a_run_that_is_interrupted_is_not_mixed_with_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    changed()
    assert tdhook(*EXPLAIN, "--target", "action_value:0").exit_code == 0

    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(explanations, "relevance_over_time", interrupted)
        assert tdhook(*EXPLAIN, "--steps", "5", "--target", "action_value:1").exit_code == 130
    assert json.loads(Path("out/summary.json").read_text())["target"] == "action_value:0"
    assert TensorDict.load_memmap("out/rollout").batch_size == (3,)
    said = fails("report", "out")
    assert "(target: action_value:1, composite: epsilon_plus, steps: 5) is not finished: run it again" in said
    Path("out/unfinished.json").unlink()
    assert tdhook("report", "out").exit_code == 0


def test_a_full_disk_is_one_line_and_the_folder_is_as_before() -> None:
    changed()
    assert tdhook(*EXPLAIN).exit_code == 0
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for room in (10, 5_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
        try:
            assert "out could not be written, and is as it was" in fails(*EXPLAIN)
            said = fails("report", "out")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert "out/report.html could not be written, and is as it was: File too large" in said
        assert tdhook("report", "out").exit_code == 0
    assert tdhook(*EXPLAIN).exit_code == 0


@pytest.mark.parametrize(
    "change, message",
    [
        ({"explanations": []}, "'explanations' is empty"),
        ({"explanations": [3]}, "explanations[0] is no table"),
        ({"explanations": {"a": 1}}, "'explanations' is"),
        ({"seed": "one"}, "'seed' is 'one', which it cannot be"),
        ({"conservation": {"target": "much"}}, "'conservation.target' is 'much'"),
        ({"conservation": {"target": 1.0}}, "KeyError: 'conservation.arrived'"),
        (
            {"composite": {"name": "a", "pairs": [{"rule": "os.system", "select": "*"}]}},
            "no rule is named 'os.system'",
        ),
        ({"composite": {"name": "a", "pairs": 3}}, "'composite.pairs' is '3'"),
    ],
)
@pytest.mark.parametrize("command", ["report", "video"])
def test_a_summary_of_another_shape_is_told(change: dict[str, Any], message: str, command: str) -> None:
    pytest.importorskip("imageio_ffmpeg")
    path = Path("out/summary.json")
    if not path.exists():
        changed()
        assert tdhook(*EXPLAIN).exit_code == 0
    Path("out/manifest.json").unlink()
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert message in fails(command, "out")


def test_relevance_of_no_entries_is_told() -> None:
    changed()
    assert tdhook(*EXPLAIN).exit_code == 0
    Path("out/manifest.json").unlink()
    path = Path("out/rollout/attr/meta.json")
    told = json.loads(path.read_text())
    told["observation"]["shape"] = [3, 0]
    path.write_text(json.dumps(told))
    assert "the rollout has no relevance of anything that the policy read" in tdhook("report", "out").stderr


def test_composite_files_that_are_nested_or_odd_are_told_in_one_line() -> None:
    deep = '{"pairs":[{"rule":"PassRule","select":' + '{"not":' * 900 + '{"name":"x"}' + "}" * 900 + "}]}"
    for name, text, message in (
        (
            "a.json",
            "[" * 100_000,
            "a.json is not valid JSON: it is nested more than 128 deep at line 1, column 129",
        ),
        ("b.toml", "\na=" + "[" * 5000 + "]" * 5000, "deep at line 2, column 131"),
        ("c.json", deep, "c.json is not valid JSON: it is nested more than 128 deep at line 1, column 914"),
        ("d.toml", "pairs = [{select='*', rule='EpsilonRule', epsilon=nan}]", "pairs[0].epsilon is nan"),
    ):
        Path(name).write_text(text)
        assert message in fails("plan", "--policy", "p.pt", "--composite", name)
    said = fails("plan", "--policy", "p.pt", "--composite", "epsilon:epsilon=nan")
    assert "epsilon is a finite number, got nan" in said
