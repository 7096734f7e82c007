"""The command line, from what is typed to what is printed and written."""

from __future__ import annotations

import inspect
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from tensordict import MemoryMappedTensor, TensorDict

import tdhook

pytest.importorskip("typer")
pytest.importorskip("torchrl")
pytest.importorskip("matplotlib")

from typer.testing import CliRunner, Result

from tdhook.attribution.lrp_helpers import rules
from tdhook.cli import main
from tdhook.cli.commands import app
from tdhook.relevance.composites.composite import PRESETS
from tdhook.rl import Policy, build_actor, save_policy

ARCHITECTURE = {"in_features": 4, "out_features": 2, "num_cells": [8], "activation": "ReLU"}
FEATURES = ("cart position", "cart velocity", "pole angle", "pole angular velocity")
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with two checkpoints."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "path", [*sys.path])
    for kind in ("dqn_mlp", "ppo_mlp"):
        metadata = {"kind": kind, "architecture": ARCHITECTURE}
        actor = build_actor(kind, ARCHITECTURE)
        save_policy(
            Policy(actor, "CartPole-v1", FEATURES, ("push left", "push right"), metadata), f"{kind}.pt"
        )
    return tmp_path


def tdhook_(*arguments: str) -> Result:
    return CliRunner().invoke(app, [*arguments], prog_name="tdhook")


def succeeds(*arguments: str) -> str:
    result = tdhook_(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


def fails(*arguments: str) -> str:
    """The one line that tells what was wrong."""
    result = tdhook_(*arguments)
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


def test_the_version() -> None:
    assert succeeds("--version") == f"tdhook {tdhook.__version__}\n"


@pytest.mark.parametrize("command", [[], ["demo"], ["explain"], ["plan"], ["rules"]])
def test_help_teaches(command: list[str]) -> None:
    text = succeeds(*command, "--help")
    assert "Usage: tdhook" in text
    if command in (["demo"], ["explain"], ["plan"]):
        assert "Examples" in text
        assert f"tdhook {command[0]}" in text.split("Examples")[1]


def test_demo_explains_the_policy_that_comes_with_tdhook() -> None:
    text = succeeds("demo", "--steps", "12", "--out", "out")
    assert "CartPole-v1: relevance for action_value:action under epsilon_plus against mean" in text
    assert "episode return 12 in 12 steps so far (cut off by --steps)" in text
    for name in FEATURES:
        assert name in text
    assert "Conservation error: " in text
    rollout = TensorDict.load_memmap("out/rollout")
    relevance = rollout["attr", "observation"]
    assert isinstance(relevance, MemoryMappedTensor)
    assert relevance.shape == rollout["observation"].shape == (12, 4)
    summary = json.loads(Path("out/summary.json").read_text())
    assert summary["target"] == "action_value:action"
    assert summary["seed"] == 0
    assert summary["baseline"] == "mean"
    conservation = summary["conservation"]
    assert conservation["error"] < 1e-3  # differences of values of about 100, in single precision
    assert conservation["arrived"] == pytest.approx(relevance.sum(-1).mean().item(), rel=1e-3, abs=1e-5)
    assert conservation["arrived"] == pytest.approx(conservation["target"], rel=1e-2, abs=1e-4)
    (explanation,) = summary["explanations"]
    assert list(explanation["mean_relevance"]) == list(FEATURES)
    assert list(explanation["mean_relevance"].values()) == pytest.approx(relevance.mean(0).tolist(), rel=1e-4)
    assert sum(explanation["action_counts"].values()) == 12
    assert Path("out/relevance.png").read_bytes().startswith(PNG)


def test_demo_explains_values_too() -> None:
    succeeds("demo", "--steps", "12", "--out", "out", "--baseline", "none")
    rollout = TensorDict.load_memmap("out/rollout")
    summary = json.loads(Path("out/summary.json").read_text())
    assert summary["baseline"] is None
    conservation = summary["conservation"]
    assert conservation["error"] < 1e-6
    arrived = rollout["attr", "observation"].sum(-1).mean().item()
    assert conservation["arrived"] == pytest.approx(arrived, rel=1e-4)
    assert conservation["target"] == pytest.approx(rollout["chosen_action_value"].mean().item(), rel=1e-4)
    assert conservation["arrived"] < 0.05 * conservation["target"]


@pytest.mark.parametrize("baseline", ["0", "mean", "previous", "sample:3", "@observation", "observation=0.5"])
def test_explain_compares_with_a_baseline(baseline: str) -> None:
    text = succeeds("explain", "--policy", "dqn_mlp.pt", "--steps", "6", "--baseline", baseline)
    assert f"under epsilon_plus against {baseline}" in text
    summary = json.loads(Path("explain-output/summary.json").read_text())
    assert summary["baseline"] == baseline
    assert summary["conservation"]["arrived"] == pytest.approx(
        summary["conservation"]["target"], rel=1e-2, abs=1e-4
    )
    rollout = TensorDict.load_memmap("explain-output/rollout")
    assert rollout["attr", "observation"].any() == (baseline != "@observation")
    if baseline == "previous":
        assert not rollout["attr", "observation"][0].any()
    succeeds("report", "explain-output")
    page = Path("explain-output/report.html").read_text(encoding="utf-8")
    assert f"against {baseline}" in page
    assert "the difference of the target from its baseline" in page


@pytest.mark.parametrize(
    "baseline, told",
    [
        ("averag", "baseline 'averag' has 'averag' in it; a baseline is a number, mean, previous, sample"),
        ("sample:0", "baseline 'sample:0' has 'sample:0' in it"),
        ("nan", "baseline 'nan' has 'nan' in it"),
        ("blur:-1", "baseline 'blur:-1' has 'blur:-1' in it"),
        ("observation=0,mean", "is one for each key, like pixels=blur:3,speed=0, or one for all"),
        ("observation=0,observation=1", "names a key twice"),
        ("@nothing", "baseline ('nothing',) is neither"),
        ("pixels=0", "the baseline names 'pixels'"),
        ("blur:2", "a blur is of pictures [rows, height, width], and got [2, 4]"),
    ],
)
def test_a_baseline_that_is_none_is_told_in_one_line(baseline: str, told: str) -> None:
    line = fails("explain", "--policy", "dqn_mlp.pt", "--steps", "2", "--baseline", baseline)
    assert told in line


def test_a_composite_file_has_a_baseline() -> None:
    Path("rules.toml").write_text('preset = "epsilon"\nbaseline = { observation = "mean" }\n')
    arguments = ("explain", "--policy", "dqn_mlp.pt", "--steps", "3", "--composite", "rules.toml")
    assert "under rules.toml against observation=mean" in succeeds(*arguments)
    assert "against 0" in succeeds(*arguments, "--baseline", "0")
    assert "against" not in succeeds(*arguments, "--baseline", "none")
    Path("rules.toml").write_text('preset = "epsilon"\nbaseline = [1, 2]\n')
    assert "rules.toml: 'baseline' is [1, 2]; a baseline is a number" in fails(*arguments)


@pytest.mark.slow
def test_demo_balances_for_a_whole_episode() -> None:
    assert "episode return 500 in 500 steps\n" in succeeds("demo")


def test_the_seed_decides() -> None:
    rollouts = []
    for seed in ("1", "1", "2"):
        succeeds("explain", "--policy", "dqn_mlp.pt", "--steps", "2", "--seed", seed)
        rollouts.append(TensorDict.load_memmap("explain-output/rollout").clone())
    assert bool((rollouts[0] == rollouts[1]).all())
    assert not torch.equal(rollouts[0]["observation"], rollouts[2]["observation"])


def test_explain_takes_a_checkpoint_a_composite_file_and_a_target() -> None:
    Path("rules.toml").write_text(
        'preset = "epsilon_plus"\n[[pairs]]\nselect = { reads = "observation" }\nrule = "FlatRule"'
    )
    text = succeeds(
        *("explain", "--policy", "dqn_mlp.pt", "--env", "CartPole-v1", "--composite", "rules.toml"),
        *("--target", "action_value:1", "--steps", "3", "--out", "out"),
    )
    assert "relevance for action_value:1 under rules.toml" in text
    relevance = TensorDict.load_memmap("out/rollout")["attr", "observation"]
    assert torch.allclose(relevance, relevance[:, :1].expand(3, 4))  # equal shares
    assert json.loads(Path("out/summary.json").read_text())["composite"]["pairs"][0]["rule"] == "FlatRule"


def test_logits_are_explained_where_there_are_no_values() -> None:
    assert "relevance for logits:action" in succeeds("explain", "--policy", "ppo_mlp.pt", "--steps", "2")


def test_explain_imports_a_policy_of_any_make() -> None:
    text = succeeds(
        "explain",
        "--policy",
        "cli_policies:acrobot",
        "--env",
        "Acrobot-v1",
        "--target",
        "scores:action",
        "--steps",
        "3",
    )
    assert "x5" in text and "action " in text
    assert TensorDict.load_memmap("explain-output/rollout")["attr", "observation"].shape == (3, 6)


def test_modules_of_the_working_directory_are_found() -> None:
    Path("local_policies.py").write_text("from cli_policies import named")
    assert "EpsilonRule()" in succeeds("plan", "--policy", "local_policies:named")
    del sys.modules["local_policies"]


def test_a_policy_that_is_returned_with_names_keeps_them() -> None:
    text = succeeds("explain", "--policy", "cli_policies:named", "--target", "scores:action", "--steps", "3")
    assert " w " in text and "go " in text


def test_a_continuous_action_is_explained_as_a_whole() -> None:
    text = succeeds(
        "explain",
        "--policy",
        "cli_policies:continuous",
        "--env",
        "Pendulum-v1",
        "--target",
        "action",
        "--steps",
        "3",
    )
    assert "relevance for action under" in text
    explained = json.loads(Path("explain-output/summary.json").read_text())["explanations"]
    assert explained[0]["action_counts"] == {}


def test_each_output_and_each_attributed_key_gets_a_table_and_a_picture() -> None:
    text = succeeds(
        *("explain", "--policy", "cli_policies:cartpole", "--env", "CartPole-v1", "--target", "scores:all"),
        *("--attribute", "hidden", "--steps", "3", "--out", "out"),
    )
    assert "Mean relevance per step, hidden, action 1" in text
    rollout = TensorDict.load_memmap("out/rollout")
    assert rollout["attr", "observation"].shape == (3, 2, 4)
    assert rollout["attr", "hidden"].shape == (3, 2, 8)
    assert {path.name for path in Path("out").glob("*.png")} == {
        "relevance.png",
        "relevance-observation-action-1.png",
        "relevance-hidden-action-0.png",
        "relevance-hidden-action-1.png",
    }


def test_many_episodes_are_summed_up_in_one_line() -> None:
    text = succeeds(
        "explain", "--policy", "cli_policies:one_way", "--target", "scores:action", "--steps", "80"
    )
    (line,) = [line for line in text.splitlines() if line.startswith("episode return")]
    assert re.fullmatch(r"episode return \d+(\.\d+)? on average over \d+ episodes \(\d+ to \d+\)", line), line


def test_a_modified_gradient_is_called_so() -> None:
    text = succeeds("explain", "--policy", "dqn_mlp.pt", "--steps", "2", "--composite", "guided_backprop")
    assert "modified gradient, which is not conserved" in text
    assert json.loads(Path("explain-output/summary.json").read_text())["conservation"] is None


def test_what_a_rollout_folder_holds_is_replaced_only_if_it_is_a_rollout() -> None:
    for steps in ("3", "2"):
        succeeds("explain", "--policy", "dqn_mlp.pt", "--steps", steps, "--out", "out")
    assert TensorDict.load_memmap("out/rollout").batch_size == (2,)
    Path("mine/rollout").mkdir(parents=True)
    Path("mine/rollout/notes.txt").write_text("mine")
    assert "holds something else" in fails(
        "explain", "--policy", "dqn_mlp.pt", "--steps", "2", "--out", "mine"
    )
    assert Path("mine/rollout/notes.txt").read_text() == "mine"


def test_plan_shows_the_rule_of_each_module() -> None:
    text = succeeds("plan", "--policy", "dqn_mlp.pt", "--composite", "epsilon_plus_flat")
    rows = {line.split()[0]: line for line in text.splitlines() if line.startswith(" module")}
    assert "FlatRule()" in rows["module.0.module.0"] and "First(Type(Linear))" in rows["module.0.module.0"]
    assert "PassRule()" in rows["module.0.module.1"]
    assert "EpsilonRule()" in rows["module.0.module.2"]
    assert "3 modules have a rule of the composite, 0 the default of their kind; " in text


def test_plan_names_what_gets_no_rule() -> None:
    text = succeeds("plan", "--policy", "cli_policies:cartpole")  # without an environment, too
    assert "those of its operations" in text
    assert "3 modules have a rule of the composite, 0 the default of their kind." in text


def test_plan_names_operations_that_nothing_is_known_of() -> None:
    text = succeeds("plan", "--policy", "cli_policies:unusual", "--env", "CartPole-v1")
    assert "nothing is known of polygamma" in text


def test_rules_lists_every_rule_and_preset_with_its_formula() -> None:
    text = succeeds("rules")
    for name in rules.__all__:
        cls = getattr(rules, name)
        if name.endswith("Rule") and not inspect.isabstract(cls):
            assert name in text, cls
    for name in PRESETS:
        assert f"{name}(" in text
    assert "R_i = x_i * sum_j w_ij R_j / stab(z_j)" in text
    assert "ZBoxRule(low, high" in text
    assert "``" not in text and ":func:" not in text


EXPLAIN = ("explain", "--steps", "2", "--policy")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((*EXPLAIN, "nowhere.pt"), "no policy checkpoint at nowhere.pt: give the path of a file that"),
        ((*EXPLAIN, "bad.toml"), "bad.toml is not a policy checkpoint of tdhook"),
        ((*EXPLAIN, "nowhere:policy"), "there is no module 'nowhere' to take a policy from"),
        ((*EXPLAIN, "cli_policies:nothing"), "module 'cli_policies' has no 'nothing'"),
        (
            (*EXPLAIN, "cli_policies:number"),
            "cli_policies:number is int, and --policy takes a function that returns the policy",
        ),
        (
            (*EXPLAIN, "cli_policies:plain"),
            "cli_policies:plain returned Linear, and a policy is a TensorDictModule",
        ),
        ((*EXPLAIN, "cli_policies:broken"), "cli_policies:broken raised RuntimeError: no weights"),
        (
            (*EXPLAIN, "cli_policies:cartpole"),
            "cli_policies:cartpole does not say in which environment it acts: give --env",
        ),
        (
            (*EXPLAIN, "cli_policies:named"),
            "Give --target KEY[:INDEX]; the policy writes hidden, scores, action",
        ),
        ((*EXPLAIN, "dqn_mlp.pt", "--env", "Nowhere-v1"), "cannot make environment 'Nowhere-v1'"),
        ((*EXPLAIN, "dqn_mlp.pt", "--env", "Acrobot-v1"), "the policy sees 4 features (cart position, "),
        (
            (*EXPLAIN, "cli_policies:acrobot", "--env", "CartPole-v1"),
            "does not run on an observation of 'CartPole-v1'",
        ),
        (
            (*EXPLAIN, "cli_policies:reads_pixels", "--env", "CartPole-v1"),
            "the policy reads 'pixels', which environment",
        ),
        (
            (*EXPLAIN, "cli_policies:never_acts", "--env", "CartPole-v1"),
            "the policy writes no 'action', so it cannot act",
        ),
        (
            (*EXPLAIN, "cli_policies:acts_otherwise", "--env", "CartPole-v1"),
            "is none of environment 'CartPole-v1'",
        ),
        (
            (*EXPLAIN, "dqn_mlp.pt", "--composite", "nothing"),
            "no preset is named 'nothing'; presets are epsilon, epsilon_plus, ",
        ),
        (
            (*EXPLAIN, "dqn_mlp.pt", "--composite", "nothing.toml"),
            "there is no file 'nothing.toml'",
        ),
        ((*EXPLAIN, "dqn_mlp.pt", "--composite", "bad.toml"), "bad.toml is not valid TOML"),
        (
            (*EXPLAIN, "dqn_mlp.pt", "--target", "value"),
            "the target names 'value', which the module did not write",
        ),
        (
            (*EXPLAIN, "dqn_mlp.pt", "--target", "action_value:2"),
            "target index 2 is out of range for 'action_value'",
        ),
        (
            (*EXPLAIN, "dqn_mlp.pt", "--target", "action_value:best"),
            "has the index 'best'; an index is a number, argmax",
        ),
        ((*EXPLAIN, "dqn_mlp.pt", "--attribute", "nothing"), "attribute names 'nothing'"),
        (
            (*EXPLAIN, "dqn_mlp.pt", "--out", "bad.toml"),
            "bad.toml is a file, where a folder is to be written",
        ),
        (("demo", "--composite", "nothing"), "no preset is named 'nothing'"),
        (("plan", "--policy", "nowhere.pt"), "no policy checkpoint at nowhere.pt"),
    ],
)
def test_a_mistake_is_told_in_one_line(arguments: tuple[str, ...], message: str) -> None:
    Path("bad.toml").write_text("pairs = ")
    assert message in fails(*arguments)


def test_what_was_mistyped_is_told_by_the_parser() -> None:
    for arguments in (["explain"], ["demo", "--steps", "0"], ["nothing"]):
        assert tdhook_(*arguments).exit_code == 2


def test_a_traceback_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TDHOOK_TRACEBACK", "1")
    assert isinstance(tdhook_("plan", "--policy", "nowhere.pt").exception, FileNotFoundError)


def test_warnings_are_notes() -> None:
    arguments = (
        "explain",
        "--policy",
        "cli_policies:unusual",
        "--env",
        "CartPole-v1",
        "--target",
        "scores:action",
    )
    told = " ".join(tdhook_(*arguments, "--steps", "2").stderr.split())
    assert "note: nothing is known of the operation `polygamma` in module `module.0.module.0`" in told


@pytest.mark.parametrize("package", ["torchrl", "gymnasium", "matplotlib"])
def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert fails("demo") == (
        f'this command needs {package}, which is not installed: pip install "tdhook[rl,viz,cli]"'
    )


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_without_the_cli_extra_it_is_named_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], package: str
) -> None:
    monkeypatch.delitem(sys.modules, "tdhook.cli.commands")
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err == (
        f'the command line needs {package}, which is not installed: pip install "tdhook[rl,viz,cli]"\n'
    )


def test_main_runs_the_command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["tdhook", "--version"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"tdhook {tdhook.__version__}\n"
