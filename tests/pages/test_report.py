"""The page of an explained rollout: what is in it is what was in the rollout, and nothing else gets in."""

from __future__ import annotations

import base64
import io
import json
import re
import sys
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from tdhook import Contrast, Target
from tdhook.pages import pictures, writing
from tdhook.pages.writing import write_report
from tdhook.relevance.composites.presets import epsilon_plus, guided_backprop
from tdhook.rl.rollouts import Conservation

FEATURES, ACTIONS = ("angle", "speed", "height"), ("left", "right")
HOSTILE = "</script><script>alert('x')</script><!-- & \u2028 {{data}}"


def rollout(*size: int, outputs: int = 0) -> TensorDict:
    middle = (outputs,) if outputs else ()
    taken = torch.arange(torch.Size(size).numel()).reshape(size) % 2
    return TensorDict(
        {
            "observation": torch.randn(*size, 3),
            "attr": {"observation": torch.randn(*size, *middle, 3)},
            "action": torch.nn.functional.one_hot(taken, 2),
            "next": {"reward": torch.randn(*size, 1), "done": torch.rand(*size, 1) < 0.2},
        },
        size,
    )


def with_frames(made: TensorDict, height: int = 12, width: int = 10) -> TensorDict:
    made["frame"] = torch.randint(0, 256, (*made.batch_size, height, width, 3), dtype=torch.uint8)
    made["attr", "frame"] = torch.randn(*made.batch_size, height, width)
    return made


class Elements(HTMLParser):
    """What a browser makes of the page: the text of each script, and of everything else together."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.scripts: list[str] = []
        self.text: list[str] = []
        self.tags: list[str] = []
        self.inside: str | None = None
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.inside = tag
        self.tags.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = None

    def handle_data(self, data: str) -> None:
        if self.inside == "script":
            self.scripts[-1] += data
        elif self.inside != "style":
            self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


class Written:
    """A page that was written, taken apart again."""

    def __init__(self, made: TensorDict, path: Path, **options: Any) -> None:
        self.path = write_report(
            made, path / "page.html", **{"features": FEATURES, "actions": ACTIONS, **options}
        )
        self.page = self.path.read_text(encoding="utf-8")
        self.elements = Elements(self.page)
        self.words = self.elements.words
        self.data = json.loads(self.elements.scripts[0])
        self.size = (self.data["environments"], self.data["time"])
        self.pictures = self.data["pictures"]

    def numbers(self, packed: dict[str, str] | None) -> Tensor:
        assert packed is not None
        array = np.frombuffer(zlib.decompress(base64.b64decode(packed["data"])), packed["kind"])
        return torch.from_numpy(array.copy()).reshape(*self.size, -1)

    def view(self, place: int = 0, name: str = "relevance") -> Tensor:
        return self.numbers(self.data["views"][place][name])

    def rows(self, place: int = 0) -> list[str]:
        return list(self.data["views"][place]["rows"])

    def map(self, environment: int, place: int, view: int = 0) -> Tensor:
        packed = zlib.decompress(base64.b64decode(self.pictures["maps"][view][environment][place]))
        values = torch.from_numpy(np.frombuffer(packed, np.int8).copy()).reshape(self.pictures["shape"])
        return values * (self.pictures["tops"][view] / 127)


@pytest.fixture
def written(tmp_path: Path) -> Any:
    return lambda made, **options: Written(made, tmp_path, **options)


def close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b.float(), rtol=1e-4, atol=1e-6)


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


def test_frames_and_their_relevance_come_through(written: Any) -> None:
    image = pytest.importorskip("PIL.Image")
    made = with_frames(rollout(2, 5))
    page = written(made)
    assert page.pictures["every"] == 1 and page.pictures["kind"] == "image/webp"
    for environment, step in ((0, 0), (1, 4)):
        decoded = image.open(io.BytesIO(base64.b64decode(page.pictures["images"][environment][step])))
        assert torch.equal(torch.from_numpy(np.array(decoded)), made["frame"][environment, step])
        expected = made["attr", "frame"][environment, step].clamp(
            -page.pictures["tops"][0], page.pictures["tops"][0]
        )
        assert torch.allclose(page.map(environment, step), expected, atol=page.pictures["tops"][0] / 200)


def test_without_pillow_frames_are_png(written: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    image = pytest.importorskip("PIL.Image")
    made = with_frames(rollout(2), height=7, width=5)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "PIL", None)
        page = written(made)
    assert page.pictures["kind"] == "image/png"
    for step in range(2):
        decoded = image.open(io.BytesIO(base64.b64decode(page.pictures["images"][0][step])))
        assert torch.equal(torch.from_numpy(np.array(decoded)), made["frame"][step])


def test_frames_of_many_colours_may_lose_a_little(written: Any) -> None:
    pytest.importorskip("PIL.Image")
    noise = with_frames(rollout(2), 90, 90)
    assert len(base64.b64decode(written(noise).pictures["images"][0][0])) < 90 * 90 * 2


@pytest.mark.parametrize("shape", [(12, 10), (12, 10, 1)])
def test_grey_frames_are_frames_too(written: Any, shape: tuple[int, ...]) -> None:
    image = pytest.importorskip("PIL.Image")
    made = rollout(2)
    made["frame"] = torch.randint(0, 256, (2, *shape), dtype=torch.uint8)
    decoded = image.open(io.BytesIO(base64.b64decode(written(made).pictures["images"][0][1])))
    expected = made["frame"][1].reshape(12, 10, 1).expand(12, 10, 3)
    assert torch.equal(torch.from_numpy(np.array(decoded)), expected)


def test_pictures_are_thinned_to_what_has_room(written: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = with_frames(rollout(40))
    whole = written(made).path.stat().st_size
    monkeypatch.setattr(pictures, "_CHARACTERS", 6_000)
    page = written(made)
    every = page.pictures["every"]
    assert every > 1 and page.path.stat().st_size < whole - 10_000
    assert len(page.pictures["images"][0]) == len(page.pictures["maps"][0][0]) == -(-40 // every)
    assert sum(map(len, page.pictures["images"][0] + page.pictures["maps"][0][0])) < 7_000
    assert f"Of every {every} steps the first has a picture" in page.words
    top = page.pictures["tops"][0]
    assert torch.allclose(page.map(0, 1), made["attr", "frame"][every].clamp(-top, top), atol=top / 200)


def test_large_frames_are_shrunk(written: Any) -> None:
    image = pytest.importorskip("PIL.Image")
    made = rollout(1)
    made["frame"] = torch.full((1, 900, 1300, 3), 7, dtype=torch.uint8)
    made["attr", "frame"] = torch.zeros(1, 300, 260)
    made["attr", "frame"][0, 297:, :] = 3.0
    page = written(made)
    assert image.open(io.BytesIO(base64.b64decode(page.pictures["images"][0][0]))).size == (434, 300)
    assert "1/3 of their size" in page.words and "mean of 3×3 pixels" in page.words
    assert page.pictures["shape"] == [100, 87] and page.pictures["reach"] == [1.0, 87 * 3 / 260]
    expected = torch.zeros(100, 87)
    expected[99] = 3.0
    assert torch.allclose(page.map(0, 0), expected, atol=0.02)


def test_an_observed_picture_is_shown_where_there_is_no_frame(written: Any) -> None:
    image = pytest.importorskip("PIL.Image")
    made = rollout(3)
    made["observation"] = torch.zeros(3, 10, 9, 4)
    made["observation"][:, 2, 5, 1] = 1.0
    made["attr", "observation"] = torch.randn(3, 10, 9, 4)
    page = written(made, features=("paddle", "ball", "trail", "brick"))
    assert page.rows() == ["paddle", "ball", "trail", "brick"]
    assert close(page.view(), made["attr", "observation"].sum((1, 2))[None])
    expected = made["attr", "observation"][1].sum(-1)
    assert torch.allclose(page.map(0, 1), expected, atol=page.pictures["tops"][0] / 100)
    frame = np.array(image.open(io.BytesIO(base64.b64decode(page.pictures["images"][0][0]))))
    assert frame.shape == (10, 9, 3) and frame[2, 5].tolist() == [255] * 3 and frame.sum() == 255 * 3


def test_channels_may_come_first(written: Any) -> None:
    made = rollout(2)
    made["pixels"], made["attr", "pixels"] = torch.rand(2, 3, 8, 9), torch.randn(2, 5, 3, 8, 9)
    page = written(made, features=None, key=("attr", "pixels"))
    assert page.rows() == ["channel 0", "channel 1", "channel 2"]
    assert [view["label"] for view in page.data["views"]] == [f"output {i}" for i in range(5)]
    assert close(page.view(4), made["attr", "pixels"][:, 4].sum((-1, -2))[None])
    assert torch.allclose(page.map(0, 1, 4), made["attr", "pixels"][1, 4].sum(0), atol=0.05)


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


class TestCommand:
    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("typer")
        pytest.importorskip("torchrl")
        pytest.importorskip("matplotlib")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setattr(sys, "path", [*sys.path])

    def tdhook(self, *arguments: str) -> Any:
        from typer.testing import CliRunner

        from tdhook.cli.commands import app

        return CliRunner().invoke(app, [*arguments], prog_name="tdhook")

    def test_it_makes_a_page_of_what_demo_wrote(self) -> None:
        assert self.tdhook("demo", "--steps", "5", "--out", "out").exit_code == 0
        result = self.tdhook("report", "out")
        assert result.exit_code == 0, result.output
        assert re.fullmatch(r"wrote out/report.html \(0.\d MB\)\n", result.output)
        page = Path("out/report.html").read_text(encoding="utf-8")
        words = Elements(page).words
        assert "CartPole-v1: relevance for action_value:action under epsilon_plus" in words
        assert "pole angular velocity" in words and "Conservation error: " in words
        assert "seed 0" in words and "EpsilonRule()" in words

    def test_it_has_every_key_and_output(self) -> None:
        explain = ("explain", "--policy", "cli_policies:cartpole", "--env", "CartPole-v1")
        what = ("--target", "scores:all", "--attribute", "hidden", "--steps", "3", "--out", "out")
        assert self.tdhook(*explain, *what).exit_code == 0
        result = self.tdhook("report", "out", "--out", "elsewhere/why.html")
        assert result.exit_code == 0, result.output
        data = json.loads(Elements(Path("elsewhere/why.html").read_text(encoding="utf-8")).scripts[0])
        labels = [view["label"] for view in data["views"]]
        assert labels == [f"{key}, action {i}" for key in ("observation", "hidden") for i in range(2)]

    def test_mistakes_end_in_one_line(self) -> None:
        Path("empty").mkdir()
        Path("odd/rollout").mkdir(parents=True)
        Path("odd/summary.json").write_text("{}")
        rollout(2).memmap("odd/rollout")
        for folder, message in (
            ("empty", "error: empty is no output folder of tdhook"),
            ("odd", "error: odd/summary.json is not as tdhook writes it: KeyError"),
        ):
            result = self.tdhook("report", folder)
            assert result.exit_code == 2
            assert result.stderr.startswith(message), result.stderr
