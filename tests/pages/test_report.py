"""The page of an explained rollout: what is in it is what was in the rollout, and nothing else gets in."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from reports import ACTIONS, FEATURES, close, rollout, with_frames
from tensordict import TensorDict

from tdhook import Contrast, Target
from tdhook.pages import writing
from tdhook.pages.writing import write_report
from tdhook.relevance.composites.presets import epsilon_plus, guided_backprop
from tdhook.rl.rollouts import Conservation

HOSTILE = "</script><script>alert('x')</script><!-- & \u2028 {{data}}"


def test_the_numbers_of_the_rollout_are_in_the_page(written: Any) -> None:
    made = rollout(30)
    page = written(made)
    assert page.size == (1, 30)
    assert page.rows() == list(FEATURES)
    assert close(page.view(), made["attr", "observation"][None])
    assert close(page.view(0, "values"), made["observation"][None])
    assert close(page.view(0, "total"), made["attr", "observation"].sum(-1)[None, :, None])
    assert close(page.numbers(page.data["reward"]), made["next", "reward"][None])
    assert torch.equal(page.numbers(page.data["taken"])[0, :, 0], made["action"].argmax(-1).to(torch.int16))
    starts = page.numbers(page.data["starts"])[0, :, 0].bool()
    assert starts[0] and torch.equal(starts[1:], made["next", "done"][:-1, 0])
    assert page.pictures is None


def test_the_summary_is_by_action(written: Any) -> None:
    made = rollout(31)
    page = written(made)
    rows = re.findall(r'<tr><th scope="row">(\w+)</th>(.*?)</tr>', page.page)
    left = made["action"][:, 0].bool()
    relevance = made["attr", "observation"]
    means = torch.stack([relevance[left].mean(0), relevance[~left].mean(0), relevance.mean(0)])
    for i, name in enumerate(FEATURES):
        cells = [float(cell) for cell in re.findall(r'data-value="([^"]+)"', dict(rows)[name])]
        assert cells == pytest.approx(means[:, i].tolist(), rel=1e-4)
    assert "left 16×" in page.words and "right 15×" in page.words
    finished = int(made["next", "done"].sum())
    assert (
        f"31 steps in {finished + (not made['next', 'done'][-1])} episodes, {finished} of them" in page.words
    )


def test_the_page_asks_for_nothing(written: Any) -> None:
    page = written(with_frames(rollout(3)))
    assert re.findall(r"""https?:|\bsrc=|\bhref=|\burl\(|@import|\bfetch\(|XMLHttp""", page.page) == []
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]+)"', page.page)
    assert policy.startswith("default-src 'none'; img-src data:; script-src 'sha256-")
    assert "unsafe" not in policy


def test_names_stay_names(written: Any) -> None:
    plain = written(rollout(4))
    page = written(
        rollout(4),
        features=[HOSTILE, '"', "'"],
        actions=[HOSTILE, "&amp;"],
        title=HOSTILE,
        target=HOSTILE,
        metadata={HOSTILE: HOSTILE},
    )
    assert page.elements.tags.count("script") == plain.elements.tags.count("script") == 2
    assert page.elements.scripts[1] == plain.elements.scripts[1]
    assert page.rows() == [HOSTILE, '"', "'"]
    assert "<" not in page.elements.scripts[0]  # a comment would open another state of the parser
    assert page.data["actions"] == [HOSTILE, "&amp;"]
    assert "alert('x')</script>" not in page.page
    for place in range(4):  # title, heading, table, facts
        assert page.words.count("alert('x')") > place


def test_several_outputs_and_keys_are_views(written: Any) -> None:
    made = rollout(2, 6, outputs=2)
    made["hidden"], made["attr", "hidden"] = torch.randn(2, 6, 2), torch.randn(2, 6, 2)
    page = written(made, more=[("attr", "hidden")])
    assert [view["label"] for view in page.data["views"]] == [
        "observation, left",
        "observation, right",
        "hidden",
    ]
    assert close(page.view(1), made["attr", "observation"][:, :, 1])
    assert close(page.view(2), made["attr", "hidden"])
    assert page.rows(2) == ["x0", "x1"]


def test_relevance_on_frames_may_be_of_each_output(written: Any) -> None:
    made = with_frames(rollout(2, outputs=2))
    made["attr", "frame"] = torch.randn(2, 2, 12, 10)
    page = written(made)
    for output in range(2):
        top = page.pictures["tops"][output]
        assert torch.allclose(
            page.map(0, 1, output), made["attr", "frame"][1, output].clamp(-top, top), atol=top / 100
        )


def test_several_agents_have_a_row_each(written: Any) -> None:
    made = TensorDict(
        {
            "agents": {"observation": torch.randn(4, 7, 2, 3), "action": torch.randn(4, 7, 2, 2)},
            "attr": {"agents": {"observation": torch.randn(4, 7, 2, 3)}},
            "next": {
                "agents": {"reward": torch.ones(4, 7, 2, 1)},
                "done": torch.zeros(4, 7, 1, dtype=torch.bool),
            },
        },
        (4, 7),
    )
    page = written(made, key=("attr", "agents", "observation"), actions=())
    assert page.rows() == ["0: angle", "0: speed", "0: height", "1: angle", "1: speed", "1: height"]
    assert close(page.view(), made["attr", "agents", "observation"].flatten(2))
    assert close(page.numbers(page.data["action"]), made["agents", "action"].flatten(2))
    assert bool((page.numbers(page.data["reward"]) == 2).all())


def test_of_many_features_the_largest_are_shown(written: Any) -> None:
    made = rollout(5)
    relevance = torch.randn(5, 100)
    relevance[:, 40:60] *= 100
    made["observation"], made["attr", "observation"] = torch.randn(5, 100), relevance
    page = written(made, features=None)
    assert len(page.rows()) == 25 and page.rows()[-1] == "76 others (sum)"
    assert {f"x{i}" for i in range(40, 60)} < set(page.rows())
    shown = [int(name[1:]) for name in page.rows()[:-1]]
    assert shown == sorted(shown)
    assert close(page.view()[..., :-1], relevance[None, :, shown])
    assert torch.allclose(page.view().sum(-1), relevance.sum(-1)[None], rtol=1e-3, atol=1e-2)
    assert "Of more than 24 features those of the largest mean |relevance| are shown" in page.words


def test_what_is_too_long_is_cut_and_said(written: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "_STEPS", 20)
    made = with_frames(rollout(5, 7))
    page = written(made)
    assert page.size == (2, 7) and len(page.pictures["images"]) == 2
    assert "The first 2 of 5 environments are shown." in page.words
    assert "35 steps" in page.words  # the summary is of all
    page = written(rollout(50))
    assert page.size == (1, 20)
    assert "The first 20 of 50 steps are shown." in page.words


def test_ten_thousand_steps_stay_small(written: Any) -> None:
    made = rollout(10_000)
    made["observation"], made["attr", "observation"] = torch.randn(10_000, 40), torch.randn(10_000, 6, 40)
    page = written(made, features=None)
    assert page.size == (1, 10_000) and len(page.data["views"]) == 6
    assert page.path.stat().st_size < 20e6


def test_one_step_is_a_rollout(written: Any) -> None:
    page = written(with_frames(rollout(1)))
    assert page.size == (1, 1) and "1 step in " in page.words


def test_an_action_that_is_no_choice_is_shown_as_it_is(written: Any) -> None:
    made = rollout(4)
    made["action"] = torch.randn(4, 2)
    page = written(made)
    assert page.data["taken"] is None and page.data["actions"] == []
    assert close(page.numbers(page.data["action"]), made["action"][None])
    assert "by action" not in page.words


def test_relevance_alone_is_enough(written: Any) -> None:
    page = written(rollout(4).select("attr"), features=None)
    assert page.data["reward"] is None and page.data["views"][0]["values"] is None
    assert page.rows() == ["x0", "x1", "x2"]


def test_the_account(written: Any) -> None:
    page = written(rollout(2), account=Conservation(2.0, 1.5, 0.5, 4.0, 1e-7))
    for text in ("+2", "+50.0%", "+1.5", "+37.5%", "+0.5", "Conservation error: 1.0e-07"):
        assert text in page.words
    assert "No account was kept" in written(rollout(2)).words
    assert "modified gradient" in written(rollout(2), composite=guided_backprop()).words


def test_a_ledger_in_the_rollout_is_the_account(written: Any) -> None:
    made = rollout(2)
    for name, values in zip(
        ("target", "inputs", "absorbed", "gap"), ([4.0, -4.0], [1.0, 2.0], [3.0, -6.0], [0, 0.4]), strict=True
    ):
        made["ledger", name] = torch.tensor(values)
    page = written(made)
    assert "Conservation error: 1.0e-01" in page.words
    assert "+1.5 +37.5%" in page.words
    assert close(page.numbers(page.data["ledger"])[0, 1], torch.tensor([-4.0, 2.0, -6.0, 0.4]))


def test_where_it_comes_from(written: Any) -> None:
    why = Contrast(Target("q", 0), Target("q", "argmax"))
    page = written(rollout(2), composite="epsilon_plus", target=why, metadata={"seed": 7, "agent": "mine"})
    for selector, rule in epsilon_plus():
        assert repr(selector) in page.words and repr(rule) in page.words
    assert "target q:0 − q:argmax" in page.words
    assert "seed 7" in page.words and "agent mine" in page.words
    versions = {"tdhook", "torch", "tensordict", "python"}
    assert versions < set(re.findall(r"<dt>(\w+)</dt>", page.page))
    assert f"torch {torch.__version__}" in page.words


def test_the_same_rollout_gives_the_same_page_and_stays_as_it_is(written: Any) -> None:
    made = with_frames(rollout(2, 3))
    before = made.clone()
    pages = {written(made).page for _ in range(2)}
    assert len(pages) == 1
    assert set(made.keys(True)) == set(before.keys(True)) and bool((made == before).all())


def nan_in(key: Any) -> TensorDict:
    made = with_frames(rollout(2))
    made[key].view(-1)[1] = torch.nan
    return made


@pytest.mark.parametrize(
    "made, options, error, message",
    [
        (rollout(0), {}, ValueError, r"nothing to report: .* at least one step, and this one \[0\]"),
        (rollout(3, 0), {}, ValueError, r"nothing to report.*\[3, 0\]"),
        (rollout(2)[0], {}, ValueError, r"nothing to report.*\[\]"),
        (rollout(2), {"key": ("attr", "pixels")}, KeyError, "no relevance .*pixels.*; it has .*observation"),
        (rollout(2), {"features": ("a", "b")}, ValueError, "has 3 features, and 2 names were given"),
        (nan_in(("attr", "observation")), {}, ValueError, "NaN or infinite"),
        (nan_in(("attr", "frame")), {}, ValueError, "on the frames has NaN or infinite"),
        (rollout(2).set("frame", torch.rand(2, 4, 4, 3)), {}, ValueError, "frames are uint8.*float32"),
        (
            rollout(2).set("frame", torch.zeros(2, 3, 4, 4, dtype=torch.uint8)),
            {},
            ValueError,
            r"frames are uint8 of shape .*\[2, 3, 4, 4\]",
        ),
        (rollout(2), {"composite": "nothing"}, ValueError, "no preset is named 'nothing'"),
    ],
)
def test_mistakes_are_told(
    tmp_path: Path, made: TensorDict, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        write_report(made, tmp_path / "page.html", **{"features": FEATURES, "actions": ACTIONS, **options})
    assert not (tmp_path / "page.html").exists()


def test_a_folder_is_no_page(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match="is a folder, where the page is to be a file"):
        write_report(rollout(2), tmp_path)
    assert write_report(rollout(2), tmp_path / "new" / "page.html").exists()


def test_equal_names_and_halves_of_surrogates_are_shown(written: Any) -> None:
    names = ["x", "x", "\ud800"]
    page = written(
        rollout(4), features=names, actions=["go", "go"], title="\udfff", metadata={"\ud800": "\ud800"}
    )
    assert page.rows() == ["x", "x", r"\ud800"]
    assert page.data["views"][0]["rows"] == ["x", "x", r"\ud800"]
    assert page.data["actions"] == ["go", "go"]
    assert r"\udfff" in page.elements.words
