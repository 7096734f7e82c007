from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest
from torch import nn

from tdhook.attribution import GradCAM, IntegratedGradients
from tdhook.composites import Composite
from tdhook.configuration import (
    read_composite,
    read_key,
    read_method,
    read_target,
    write_key,
    write_target,
)
from tdhook.relevance.composites.composite import PRESETS
from tdhook.relevance.composites.presets import epsilon_gamma_box, epsilon_plus
from tdhook.rules import EpsilonRule, FlatRule, GammaRule, ZBoxRule
from tdhook.selectors import Last, Reads, Type
from tdhook.targets import Key, Target

EXAMPLE = Path(__file__).parents[1] / "examples" / "composite.toml"


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "epsilon_gamma_box"])
def test_the_name_of_a_preset_stands_for_it(name: str) -> None:
    assert read_composite(name) == PRESETS[name]()


def test_a_preset_takes_parameters() -> None:
    assert read_composite("epsilon_gamma_box:low=-1.5, high=2.0, gamma=0.5") == epsilon_gamma_box(
        -1.5, 2.0, gamma=0.5
    )
    assert read_composite("epsilon_plus:zero_params='bias'") == epsilon_plus(zero_params="bias")


@pytest.mark.parametrize("suffix", [".toml", ".json", ".TOML"])
def test_a_file_holds_pairs_and_a_preset(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rules{suffix}"
    path.write_text(
        'preset = "epsilon_gamma_box"\nlow = 0\nhigh = 1\n[[pairs]]\nselect = { reads = ["agents", "pixels"] }\n'
        'rule = "FlatRule"\n'
        if suffix != ".json"
        else json.dumps(
            {
                "preset": "epsilon_gamma_box",
                "low": 0,
                "high": 1,
                "pairs": [{"select": {"reads": ["agents", "pixels"]}, "rule": "FlatRule"}],
            }
        )
    )
    expected = Composite([(Reads(("agents", "pixels")), FlatRule())]) + epsilon_gamma_box(0, 1)
    assert read_composite(path) == read_composite(str(path)) == expected


def test_a_composite_comes_back_from_its_own_data(tmp_path: Path) -> None:
    composite = Composite([(nn.Linear, GammaRule(0.5)), ("head.*", ZBoxRule(0.0, 1.0))]) + epsilon_plus()
    path = tmp_path / "rules.json"
    path.write_text(json.dumps(composite.to_dict()))
    assert read_composite(path) == composite


def test_the_example_is_what_it_says() -> None:
    first, last, *rest = read_composite(EXAMPLE)
    assert first == (Reads("observation"), GammaRule(0.5))
    assert isinstance(last[0], Last)
    assert last[1] == EpsilonRule(zero_params="bias")
    assert rest == list(epsilon_plus(epsilon=1e-4))


@pytest.mark.parametrize(
    "text, baseline",
    [
        ("baseline=mean,steps=5", "mean"),
        ("steps=5,baseline='mean'", "mean"),
        ('baseline="mean", steps=5', "mean"),
        ("baseline=@before.x,steps=5", ("before", "x")),
        ("steps=5,baseline=-1e-3", -1e-3),
    ],
)
def test_text_needs_no_quotes_which_a_shell_takes_away(text: str, baseline: object) -> None:
    method = read_method(f"integrated_gradients:{text}")
    assert isinstance(method, IntegratedGradients) and method.steps == 5
    assert method.references is not None and method.references.baseline == baseline
    maps = read_method("grad_cam:layer=0.module.act,relu=false,grid=[2, 3]")
    assert isinstance(maps, GradCAM) and (maps.layer, maps.relu) == ("0.module.act", False)
    inner = read_method("conductance:input_modules=[0.act, 'b c']")
    assert inner.input_modules == ("0.act", "b c")


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("nothing", None, "no preset is named 'nothing'; presets are epsilon, epsilon_plus, "),
        (
            "epsilon_gamma_box",
            None,
            "missing 2 required positional arguments.*epsilon_gamma_box:low=-1,high=1",
        ),
        ("epsilon_plus:loud", None, "preset 'epsilon_plus': 'loud' are no parameters"),
        ("epsilon_plus:loud=1", None, "preset 'epsilon_plus': .*unexpected keyword argument 'loud'"),
        ("a.toml", "preset = ", "a.toml is not valid TOML"),
        ("a.toml", b"\xff", "a.toml is not valid TOML"),
        ("a.json", "{", "a.json is not valid JSON"),
        ("a.json", "[1]", "a.json holds no table"),
        ("a.json", "{}", "a.json makes no composite: a composite is given by 'pairs', 'preset' or both"),
        ("a.toml", "pairs = 3", "a.toml: 'pairs' is a list of tables"),
        ("a.toml", "pairs = [3]", "each of 'pairs' has 'select' and 'rule', got 3"),
        ("a.toml", 'pairs = [{select = "*", rule = "Nope"}]', "no rule is named 'Nope'; rules are AHQKVRule"),
        (
            "a.toml",
            'pairs = [{select = {regex = "("}, rule = "PassRule"}]',
            "a.toml makes no composite",
        ),
        ("a.toml", 'pairs = [{select = {type = 3}, rule = "PassRule"}]', "a.toml makes no composite"),
        ("a.toml", 'pairs = [{select = {first = 3}, rule = "PassRule"}]', "a.toml makes no composite"),
        (
            "a.json",
            "[" * 100_000,
            "a.json is not valid JSON: it is nested more than 128 deep at line 1, column 129",
        ),
        ("a.toml", "\na = " + "[" * 5_000, "a.toml is not valid TOML: .* at line 2, column 133"),
        ("epsilon:epsilon=" + "[" * 5_000, None, "preset 'epsilon': 'epsilon=.* are no parameters"),
        (
            "a.toml",
            "[[pairs]]\nselect." + "not." * 900 + 'name = "x"\nrule = "PassRule"',
            r"pairs\[0\]\.select\.not\.not\..* is nested more than 64 deep",
        ),
        ("a.json", '{"preset": ["epsilon"]}', r"'preset' is the name of one, got \['epsilon'\]"),
        ("a.json", '{"preset": "epsilon", "preset": "epsilon_plus"}', "a table has the name 'preset' twice"),
        *(
            ("a.json", '{"pairs": [{"select": "*", "rule": "PassRule"}, ' + pair + "]}", message)
            for pair, message in (
                ('{"select": "*", "rule": "EpsilonRule", "epsilon": NaN}', r"pairs\[1\]\.epsilon is nan"),
                (
                    '{"select": "*", "rule": "EpsilonRule", "epsilon": Infinity}',
                    r"pairs\[1\]: epsilon is a finite",
                ),
                (
                    '{"select": "*", "rule": "GammaRule", "gamma": "1"}',
                    r"pairs\[1\]: GammaRule does not take",
                ),
                ('{"select": "*", "rule": "GammaRule", "gamma": true}', "gamma is a number, got True"),
                ('{"select": "*", "rule": "AlphaBetaRule", "alpha": -Infinity}', "alpha is a finite number"),
                (
                    '{"select": "*", "rule": "ZBoxRule", "low": [1, 2], "high": [1, 2, 3]}',
                    r"pairs\[1\]: ZBoxRule",
                ),
                (
                    '{"select": "*", "rule": "ZBoxRule", "low": {}, "high": 1}',
                    r"pairs\[1\]: ZBoxRule does not take",
                ),
                (
                    '{"select": "*", "rule": "ZBoxRule", "low": -Infinity, "high": 1}',
                    "is a finite number",
                ),
                (
                    '{"select": {"type": {"Linear": 1}}, "rule": "PassRule"}',
                    "neither a name nor a list of names",
                ),
                ('{"select": {"op": 3}, "rule": "PassRule"}', "3 is neither a name nor a list of names"),
                ('{"select": {"reads": [1]}, "rule": "PassRule"}', "neither a name nor a list of names"),
                (
                    '{"select": {"regex": {"pattern": "a", "flag": 2}}, "rule": "PassRule"}',
                    "regular expression is",
                ),
                (
                    '{"select": {"regex": {"pattern": "a", "flags": 1' + "0" * 40 + '}}, "rule": "PassRule"}',
                    "not a sel",
                ),
                ('{"select": {"regex": "' + "(" * 20_000 + '"}, "rule": "PassRule"}', "not a selector"),
            )
        ),
    ],
)
def test_what_makes_no_composite_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: str | bytes | None, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        read_composite(name)


def test_a_file_that_is_not_there_is_told() -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no file 'nowhere\.toml'"):
        read_composite("nowhere.toml")


@pytest.mark.parametrize(
    "text, target",
    [
        ("action_value", Target("action_value")),
        ("action_value:argmax", Target("action_value", "argmax")),
        ("logits:action", Target("logits", "action")),
        ("logits:all", Target("logits", "all")),
        ("logits:-1", Target("logits", -1)),
        ("logits:2,3", Target("logits", (2, 3))),
        ("agents.logits:0", Target(("agents", "logits"), 0)),
        ("logits:@greedy", Target("logits", Key("greedy"))),
        ("logits:@agents.action", Target("logits", Key(("agents", "action")))),
    ],
)
def test_a_target_is_read_and_written(text: str, target: Target) -> None:
    assert read_target(text) == target
    assert write_target(target) == text


def test_none_is_the_whole_output() -> None:
    assert read_target("logits:none") == read_target("logits:") == Target("logits")


def test_a_key_given_as_a_tuple_is_written_too() -> None:
    assert write_target(Target("logits", ("agents", "action"))) == "logits:@agents.action"


@pytest.mark.parametrize(
    "text, message",
    [
        (
            "logits:greedy",
            "target 'logits:greedy' has the index 'greedy'; an index is a number, argmax, action, all, none",
        ),
        ("logits:1.5", "has the index '1.5'"),
        (":0", "'' names no key"),
        ("agents..logits", "'agents..logits' names no key"),
        ("logits:@", "'' names no key"),
    ],
)
def test_what_is_no_target_is_told(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_target(text)


@pytest.mark.parametrize("key", ["logits", ("agents", "logits")])
def test_a_key_is_read_and_written(key: str | tuple[str, ...]) -> None:
    assert read_key(write_key(key)) == key


@pytest.mark.parametrize("key", ["a.b", ("a", "b.c"), "a:b", "a\\.b", ("\\", ":"), "@a"])
def test_a_name_with_a_dot_or_colon_in_it_comes_back(key: str | tuple[str, ...]) -> None:
    assert read_key(write_key(key)) == key
    for target in (Target(key), Target(key, 3), Target("logits", Key(key)), Target(key, ("a.b", "c"))):
        again = read_target(write_target(target))
        assert again.key == target.key
        assert again.index == (target.index if not isinstance(target.index, tuple) else Key(target.index))


def test_brackets_in_text_and_comments_open_nothing(tmp_path: Path) -> None:
    many = "[" * 500
    (tmp_path / "a.toml").write_text(
        f'preset = "epsilon" # {many}\n[[pairs]]\nselect = "{many}"\nrule = "PassRule"\n'
        f"[[pairs]]\nselect = '''{many}\n'''\nrule = 'PassRule'\n"
        f'[[pairs]]\nselect = """\\"{many}"""\nrule = "PassRule"\n'
    )
    assert len(read_composite(tmp_path / "a.toml")) == 3 + len(read_composite("epsilon"))
    (tmp_path / "a.json").write_text('{"pairs": [{"select": "\\"' + many + '", "rule": "PassRule"}]}')
    assert len(read_composite(tmp_path / "a.json")) == 1


def test_a_class_that_a_module_would_import_when_asked_is_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lazy = types.ModuleType("lazy")
    lazy.__getattr__ = lambda name: pytest.fail(f"{name} was imported")  # type: ignore[method-assign]
    monkeypatch.setitem(sys.modules, "lazy", lazy)
    (tmp_path / "a.toml").write_text('pairs = [{select = {type = "lazy.Layer"}, rule = "PassRule"}]')
    assert read_composite(tmp_path / "a.toml").pairs[0][0] == Type("lazy.Layer")
