"""`tdhook concepts` writes a page of what units respond to, of data or of what the policy does."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict

pytest.importorskip("typer")
pytest.importorskip("torchrl")

from typer.testing import CliRunner, Result

from tdhook import LRP, Target
from tdhook.cli.commands import app
from tdhook.concepts import ReferenceSamples
from tdhook.rl import load_policy, save_policy
from tdhook.rl.policies import Policy, build_actor

LAYER = "module.0.module.1"


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "path", [*sys.path])
    torch.manual_seed(0)
    architecture = {"in_features": 4, "out_features": 2, "num_cells": [8], "activation": "ReLU"}
    features, actions = ("w", "x", "y", "z"), ("go west", "go east")
    actor = build_actor("dqn_mlp", architecture)
    save_policy(
        Policy(actor, "CartPole-v1", features, actions, {"kind": "dqn_mlp", "architecture": architecture}),
        "policy.pt",
    )
    action = torch.nn.functional.one_hot(torch.arange(60) % 2, 2).bool()
    observation = torch.randn(60, 4, generator=torch.Generator().manual_seed(1))
    TensorDict({"observation": observation, "action": action}, [60]).memmap("buffer")


def concepts(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["concepts", "--policy", "policy.pt", *arguments])


def test_of_data() -> None:
    result = concepts(
        "--layer", LAYER, "--source", "buffer", "--units", "2", "--top", "3", "--out", "page.html"
    )
    assert result.exit_code == 0, result.output
    assert "wrote page.html" in result.output
    page = Path("page.html").read_text(encoding="utf-8")
    assert "60 steps, 8 units" in page and "go west" in page and "go east" in page
    assert page.count('class="unit"') == 4 and page.count("row ") >= 12 and "action_value:action" in page


def test_of_acting() -> None:
    result = concepts("--layer", LAYER, "--steps", "30", "--by", "value", "--units", "1")
    assert result.exit_code == 0, result.output
    page = Path("concepts.html").read_text(encoding="utf-8")
    assert "30 steps, 8 units" in page and "mean value" in page and "30 steps of acting, seed 0" in page


def test_with_a_graph() -> None:
    pytest.importorskip("matplotlib")
    graph = ("--graph", LAYER, "--graph", "module.0.module.2")
    result = concepts("--layer", LAYER, "--source", "buffer", "--units", "2", "--top", "3", *graph)
    assert result.exit_code == 0, result.output
    page = Path("concepts.html").read_text(encoding="utf-8")
    assert page.count('<img class="graph"') == 2 and "What units hand on to earlier ones on average" in page


def test_against_a_baseline() -> None:
    """What is compared with is that of all rows, also where a graph is of few."""
    pytest.importorskip("matplotlib")
    Path("why.toml").write_text('preset = "deeplift"\nbaseline = "mean"\n')
    for given in (("--composite", "why.toml"), ("--composite", "deeplift_shapley", "--baseline", "mean")):
        result = concepts("--layer", LAYER, "--source", "buffer", "--units", "2", "--graph", LAYER, *given)
        assert result.exit_code == 0, result.output
        assert "<dt>baseline</dt><dd>mean</dd>" in Path("concepts.html").read_text(encoding="utf-8")
    given = ("--composite", "deeplift", "--baseline", "previous", "--steps", "9")
    assert concepts("--layer", LAYER, *given).exit_code == 0
    result = concepts("--layer", LAYER, *given, "--graph", LAYER)
    assert result.exit_code == 2 and "a graph is of single steps" in result.output


def test_units_of_a_job_are_shown_as_units() -> None:
    actor = load_policy("policy.pt").actor
    method = LRP("epsilon_plus", target=Target("action_value", "action"))
    samples = ReferenceSamples(method, LAYER, groups="action")
    samples.job(actor, "buffer", "job").work()
    result = CliRunner().invoke(app, ["dataset", "reduce", "job"])
    assert result.exit_code == 0 and "units: mean relevance" in result.output and "unit 7" in result.output


def test_mistakes_are_told() -> None:
    for arguments, told in (
        (("--layer", "nothing"), "the model has no module 'nothing'; it has"),
        (("--layer", LAYER, "--by", "size"), "--by size is neither relevance nor value"),
        (("--layer", LAYER, "--axis", "2"), "axis=2 is no axis of units of 'module.0.module.1'"),
        (("--layer", LAYER, "--heads", "3"), "does not consist of 3 equal heads"),
        (
            ("--layer", LAYER, "--out", "buffer"),
            "is a folder, where the page is to be a file: give --out FILE",
        ),
    ):
        result = concepts(*arguments, "--source", "buffer")
        assert result.exit_code == 2 and told in " ".join(result.output.split()), result.output
        assert not Path("concepts.html").exists()
