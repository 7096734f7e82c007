"""Methods besides LRP, by their names: `tdhook methods` and `tdhook explain --method`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from tensordict import TensorDict

pytest.importorskip("typer")
pytest.importorskip("torchrl")
from typer.testing import CliRunner

import tdhook
from tdhook.attribution.catalogue import METHODS
from tdhook.cli.commands import app
from tdhook.rl import Policy, build_actor, save_policy

EXPLAIN = ("explain", "--policy", "policy.pt", "--steps", "6")


@pytest.fixture(autouse=True)
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "path", [*sys.path])
    shape = {"in_features": 4, "out_features": 2, "num_cells": [8], "activation": "ReLU"}
    made = {"kind": "dqn_mlp", "architecture": shape}
    save_policy(
        Policy(build_actor("dqn_mlp", shape), "CartPole-v1", tuple("abcd"), ("left", "right"), made),
        "policy.pt",
    )


def output(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, [*arguments], prog_name="tdhook")
    assert result.exit_code == code, result.output
    return result.output if code == 0 else result.stderr


def summary() -> dict[str, Any]:
    told: dict[str, Any] = json.loads(Path("explain-output/summary.json").read_text())
    return told


def test_all_are_listed() -> None:
    text = output("methods")
    for name, listed in METHODS.items():
        assert name in text and listed.cost.split(",")[0] in text


def test_a_method_with_a_tolerance() -> None:
    text = output(*EXPLAIN, "--method", "integrated_gradients", "--tolerance", "1e-3", "--baseline", "mean")
    assert "under integrated_gradients against mean" in text and "arrived at the inputs" in text
    assert summary()["method"] == "integrated_gradients"
    gap = TensorDict.load_memmap("explain-output/rollout")["ledger", "gap"]
    assert gap.shape == (6,) and gap.abs().max() <= 1e-3
    output("report", "explain-output")
    page = Path("explain-output/report.html").read_text(encoding="utf-8")
    assert "by the method <code>integrated_gradients</code>, under no rules" in page


def test_a_measure_is_not_conserved() -> None:
    text = output(*EXPLAIN, "--method", "gradient")
    assert "The method gradient gives a measure, which is not conserved" in text
    assert summary()["conservation"] is None
    assert (TensorDict.load_memmap("explain-output/rollout")["attr", "observation"] >= 0).all()


@pytest.mark.parametrize("method", ["lrp:composite=epsilon", "deeplift_shapley"])
def test_lrp_by_name_is_accounted_for_by_its_own_rules(method: str) -> None:
    text = output(*EXPLAIN, "--method", method, "--baseline", "mean")
    assert "arrived at the inputs" in text
    told = summary()
    assert told["method"] is None and told["conservation"]["arrived"] == pytest.approx(
        told["conservation"]["target"], abs=1e-4
    )
    name = "EpsilonRule" if method.startswith("lrp") else "ShapleyRule"
    assert told["composite"]["pairs"][0]["rule"] == name
    output("report", "explain-output")
    assert f"{name}(" in Path("explain-output/report.html").read_text(encoding="utf-8")


def test_what_has_no_rules_has_none_in_its_summary() -> None:
    output(*EXPLAIN, "--method", "gradient")
    assert summary()["composite"] == {"name": "gradient", "pairs": []}


def test_a_method_from_a_file() -> None:
    Path("smooth.toml").write_text(
        'method = "gradient"\nsigned = true\naveraged = { noise = 0.05, samples = 5 }\n'
    )
    assert "under smooth.toml" in output(*EXPLAIN, "--method", "smooth.toml")


@pytest.mark.parametrize(
    "arguments, told",
    [
        (("--method", "nothing"), "no method is named 'nothing'; methods are lrp, gradient"),
        (("--method", "grad_cam"), "the method 'grad_cam' needs layer: say layer=..."),
        (("--method", "gradient:x=1"), "the method 'gradient' has no option 'x'; it has signed"),
        (
            ("--method", "gradient", "--baseline", "mean"),
            "Gradient compares with no baseline: leave out the baseline",
        ),
        (("--method", "gradient", "--tolerance", "1"), "the method 'gradient' has no option 'tolerance'"),
        (("--method", "gradient", "--composite", "epsilon"), "--composite is one of LRP, and --method"),
        (("--method", "gradient", "--composite", "epsilon_plus"), "--composite is one of LRP, and --method"),
        (("--method", "nothing.toml"), "there is no file 'nothing.toml'"),
        (
            ("--method", "conductance:input_modules=module.0"),
            "input_modules='module.0' is no list of paths; write ['module.0']",
        ),
        (("--tolerance", "1"), "--tolerance is one of a method: give --method integrated_gradients"),
        (("--method", "integrated_gradients:steps='a'"), "cannot be made with steps='a'"),
        (
            ("--method", "integrated_gradients:loud"),
            "method 'integrated_gradients': 'loud' are no parameters",
        ),
    ],
)
def test_a_mistake_is_told(arguments: tuple[str, ...], told: str) -> None:
    assert told in output(*EXPLAIN, *arguments, code=2)


def test_values_inside_the_policy_are_left_out_of_the_page() -> None:
    """A layer that sees pictures has other features than the policy has names for."""
    pytest.importorskip("ale_py")
    layer, policy = (
        "module.0.module.0.5",
        Path(tdhook.__file__).parent / "rl" / "checkpoints" / "freeway_ppo.pt",
    )
    output("explain", "--policy", str(policy), "--steps", "3", "--method", f"grad_cam:layer={layer}")
    assert ("attr", layer) in TensorDict.load_memmap("explain-output/rollout").keys(True)
    output("report", "explain-output")
