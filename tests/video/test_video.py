"""Videos of explained rollouts, and the frames that they need: read back, and looked at."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

pytest.importorskip("imageio_ffmpeg")
pytest.importorskip("PIL")

import imageio_ffmpeg as ffmpeg

from tdhook.video import write_video

FRAMES = torch.zeros(5, 20, 30, 3, dtype=torch.uint8)


def read(path: Path) -> Tensor:
    """The pictures of a video ``[n, height, width, 3]``."""
    command = [
        ffmpeg.get_ffmpeg_exe(),
        "-v",
        "error",
        "-i",
        str(path),
        "-fps_mode",
        "passthrough",
        "-f",
        "rawvideo",
        "-pix_fmt",
        "rgb24",
        "-",
    ]
    pictures = subprocess.run(command, capture_output=True, check=True).stdout
    shape = re.search(
        r" (\d+)x(\d+)[, ]",
        subprocess.run([*command[:1], "-i", str(path)], capture_output=True, text=True).stderr,
    )
    width, height = map(int, shape.groups())
    return torch.frombuffer(bytearray(pictures), dtype=torch.uint8).reshape(-1, height, width, 3)


def is_red(pictures: Tensor) -> Tensor:
    red, green, blue = pictures.long().unbind(-1)
    return (red > green + 60) & (red > blue + 60)


def is_blue(pictures: Tensor) -> Tensor:
    red, green, blue = pictures.long().unbind(-1)
    return (blue > green + 20) & (blue > red + 60)


def rollout(steps: int = 5, **entries: Tensor) -> TensorDict:
    data = {
        "frame": FRAMES[:1].repeat(steps, 1, 1, 1),
        "observation": torch.zeros(steps, 3),
        "action": torch.tensor([1, 0]).repeat(steps, 1),
        "attr": {"observation": torch.ones(steps, 3)},
        "next": {"reward": torch.ones(steps, 1), "done": torch.zeros(steps, 1, dtype=torch.bool)},
    }
    return TensorDict({**data, **entries}, batch_size=[steps])


@pytest.mark.parametrize("name", ["a.mp4", "b.gif"])
def test_relevance_lies_over_the_frame_at_its_place(tmp_path: Path, name: str) -> None:
    relevance = torch.zeros(5, 2, 3)
    relevance[:, 0, 0], relevance[:, 1, 2] = 1.0, -1.0
    path = write_video((FRAMES, relevance), tmp_path / "new" / name, fps=10)
    shown = read(path)
    assert len(shown) == 5
    assert shown.shape[1] % 2 == shown.shape[2] % 2 == 0
    zoom = 16  # 20 rows are made 320
    for found, row, column in ((is_red(shown[2]), 5, 5), (is_blue(shown[2]), 15, 25)):
        y, x = 12 + row * zoom, 24 + 30 * zoom + column * zoom
        height, width = 12 + 20 * zoom, 24 + 30 * zoom  # the legend, which has these colours too, lies below
        assert bool(found[y, x])
        assert 0.8 < found[:height, width:].float().sum() / (10 * 10 * zoom**2) < 1.2
        assert not bool(found[:height, : width - 12].any())  # the frame itself is as it was


def test_bars_go_to_the_side_they_speak_for_and_are_as_long_as_relevance(tmp_path: Path) -> None:
    relevance = torch.tensor([[1.0, -0.5, 0.0]]).repeat(5, 1)
    shown = read(
        write_video((FRAMES, relevance), tmp_path / "a.mp4", features=["for", "against", "neither"])
    )[3]
    above = shown[: 12 + 320]
    red, blue = is_red(above).nonzero(), is_blue(above).nonzero()
    assert int(red[:, 1].min()) >= int(blue[:, 1].max()) - 2
    long, short = (int(each[:, 1].max() - each[:, 1].min()) for each in (red, blue))
    assert abs(long - 116) <= 3 and abs(short - 58) <= 3
    assert int(red[:, 0].max()) < int(blue[:, 0].min())  # one row below the other


def test_the_scale_is_one_for_all_steps(tmp_path: Path) -> None:
    relevance = torch.linspace(0.2, 1.0, 5)[:, None]
    shown = read(write_video((FRAMES, relevance), tmp_path / "a.mp4"))[:, :332]
    lengths = is_red(shown).any(1).sum(-1).tolist()
    assert lengths == pytest.approx([0.2 * 116, 0.4 * 116, 0.6 * 116, 0.8 * 116, 116], abs=3)


@pytest.mark.parametrize("layout", ["channels first", "channels last", "frame"])
def test_relevance_of_an_image_in_a_rollout(tmp_path: Path, layout: str) -> None:
    relevance = torch.zeros(5, 4, 10, 15)
    relevance[:, :, :5] = 0.25
    td = rollout()
    if layout == "frame":
        td["attr", "frame"] = relevance.sum(1)
    else:
        td["observation"] = relevance if layout == "channels first" else relevance.movedim(1, -1)
        td["attr", "observation"] = td["observation"].clone()
    shown = read(write_video(td, tmp_path / "a.mp4", every=2))
    assert len(shown) == 3
    red = is_red(shown[1, 12:332, 24 + 480 : 24 + 960])
    assert red[:150].float().mean() > 0.95 and not bool(red[170:].any())


def test_every_and_steps_choose(tmp_path: Path) -> None:
    done = []
    relevance = torch.ones(100, 2)
    frames = FRAMES[:1].repeat(100, 1, 1, 1)
    path = write_video(
        (frames, relevance), tmp_path / "a.mp4", every=3, steps=55, progress=lambda *of: done.append(of)
    )
    assert len(read(path)) == 19
    assert done == [(16, 19), (19, 19)]


def test_the_caption_tells_step_action_and_return(tmp_path: Path) -> None:
    from tdhook.video import _captions

    td = rollout()
    td["next", "done"][2] = True
    caption = _captions(td, ["left", "right"])
    assert [caption(step) for step in (0, 2, 3)] == [
        "step 0   left   return 1",
        "step 2   left   return 3",
        "step 3   left   return 1",
    ]
    assert _captions(td, [])(0) == "step 0   action 0   return 1"
    td["action"] = torch.full((5, 2), 0.25)
    assert _captions(td, [])(0) == "step 0   action +0.25 +0.25   return 1"
    td["action"] = torch.zeros(5, 20)
    assert _captions(td.exclude("next"), [])(4) == "step 4"


def test_many_features_and_long_names(tmp_path: Path) -> None:
    relevance = torch.randn(5, 40)
    names = [f"a very long name of the feature θ number {i}" for i in range(40)]
    assert len(read(write_video((FRAMES, relevance), tmp_path / "a.mp4", features=names))) == 5


def test_ten_thousand_steps_are_read_in_parts(tmp_path: Path) -> None:
    td = rollout(10_000)
    td["frame"] = FRAMES[:1, :4, :4].repeat(10_000, 1, 1, 1)
    td["attr", "frame"] = torch.zeros(10_000, 2, 2)
    td["attr", "frame"][9_900:] = 1.0
    td.memmap(tmp_path / "rollout")
    shown = read(write_video(TensorDict.load_memmap(tmp_path / "rollout"), tmp_path / "a.mp4", every=500))
    assert len(shown) == 20
    assert len(read(write_video(rollout(1), tmp_path / "one.mp4"))) == 1


@pytest.mark.parametrize(
    "source, options, error, message",
    [
        ((FRAMES[:0], torch.zeros(0, 3)), {}, ValueError, "there is nothing to show: frames have shape"),
        ((FRAMES, torch.zeros(4, 3)), {}, ValueError, "there are 5 frames, and relevance of 4 steps"),
        (
            (FRAMES, torch.zeros(5)),
            {},
            ValueError,
            r"relevance has shape \[time, rows, columns\] .* got \(5,\)",
        ),
        ((FRAMES, torch.full((5, 3), torch.nan)), {}, ValueError, "NaN or infinite"),
        ((FRAMES, torch.zeros(5, 3)), {"features": ["a"]}, ValueError, "3 features, and 1 names"),
        ((FRAMES, torch.zeros(5, 3)), {"every": 0}, ValueError, "every, steps and fps are positive"),
        (rollout().exclude("frame"), {}, KeyError, r"no 'frame': .*frames=True.* tdhook explain --frames"),
        (rollout().exclude("attr"), {}, KeyError, "the rollout has that of nothing"),
        (rollout(attr={"observation": torch.ones(5, 3), "b": torch.ones(5, 3)}), {}, KeyError, "Give key="),
        (rollout(), {"key": "b"}, KeyError, r"no relevance of 'b'; it has that of \[\('observation',\)\]"),
        (rollout().unsqueeze(0), {}, ValueError, r"this one has \[1, 5\]: choose one, as in rollout\[0\]"),
        (rollout(attr={"observation": torch.ones(5, 2, 3)}), {}, ValueError, "it is that of several targets"),
        (rollout(attr={"frame": torch.ones(5, 1, 2, 3)}), {}, ValueError, r"\[time, rows, columns\], got"),
        (
            rollout(attr={"observation": torch.ones(5, 3, 3, 3)}, observation=torch.ones(5, 3, 3, 3)),
            {},
            ValueError,
            "it cannot be seen which axis has the channels",
        ),
    ],
)
def test_what_cannot_be_shown_is_told(
    tmp_path: Path, source: object, options: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        write_video(source, tmp_path / "a.mp4", **options)
    assert not (tmp_path / "a.mp4").exists()


def test_other_formats_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ends in \.mp4 or \.gif, got .*a\.avi"):
        write_video((FRAMES, torch.zeros(5, 3)), tmp_path / "a.avi")


def test_a_video_that_cannot_be_finished_is_removed(tmp_path: Path) -> None:
    relevance = torch.zeros(40, 2, 3)
    relevance[30] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        write_video((FRAMES[:1].repeat(40, 1, 1, 1), relevance), tmp_path / "a.mp4", scale=1.0)
    assert not (tmp_path / "a.mp4").exists()


def test_without_ffmpeg_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(
        ImportError, match=r'tdhook\.video needs imageio-ffmpeg.*pip install "tdhook\[video\]"'
    ):
        write_video((FRAMES, torch.zeros(5, 3)), tmp_path / "a.mp4")


class TestFrames:
    """Rendered beside an explained rollout."""

    pytest.importorskip("torchrl")
    pytest.importorskip("pygame")

    def test_the_frame_is_what_the_policy_saw_before_it_acted(self) -> None:
        from tdhook import LRP, Target
        from tdhook.rl import build_actor, make_env
        from tdhook.rl.rollouts import explained_rollout

        # An untrained policy soon lets the pole fall: the rollout has several episodes.
        architecture = {"in_features": 4, "out_features": 2, "num_cells": [8], "activation": "Tanh"}
        actor = build_actor("dqn_mlp", architecture)
        explained = LRP("epsilon_plus", target=Target("action_value", "action")).wrap(actor)
        made = explained_rollout(make_env("CartPole-v1", 0, render=True), explained, 25, frames=True)
        assert made["frame"].shape == (25, 200, 300, 3) and made["frame"].dtype == torch.uint8
        assert made["attr", "observation"].shape == (25, 4)
        assert int(made["next", "done"].sum()) >= 1

        env = make_env("CartPole-v1", 0, render=True)
        td = env.reset()
        for step in range(25):
            picture = torch.as_tensor(env.render().copy()).float().movedim(-1, 0)
            small = torch.nn.functional.avg_pool2d(picture, 2).round().movedim(0, -1)
            assert torch.equal(made["frame"][step].float(), small)
            td["action"] = made["action"][step]
            td = env.step_and_maybe_reset(td)[1]
        bare = explained_rollout(make_env("CartPole-v1", 0), explained, 25)
        assert bool((bare == made.exclude("frame")).all())  # rendering changes nothing

    @pytest.mark.filterwarnings("ignore:.*render_mode:UserWarning")
    def test_an_environment_without_pictures_is_told(self) -> None:
        from tdhook import LRP, Target
        from tdhook.rl import demo_policy, make_env
        from tdhook.rl.rollouts import explained_rollout

        explained = LRP("epsilon_plus", target=Target("action_value", "action")).wrap(demo_policy().actor)
        with pytest.raises(ValueError, match=r"GymEnv was not made to be rendered: .*render=True"):
            explained_rollout(make_env("CartPole-v1"), explained, 2, frames=True)
        from torchrl.envs import GymEnv

        env = GymEnv("CartPole-v1", render_mode="ansi", categorical_action_encoding=False)
        with pytest.raises(ValueError, match=r"GymEnv (renders no pictures|cannot be rendered)"):
            explained_rollout(env, explained, 2, frames=True)


class TestCommand:
    """``tdhook video``."""

    pytest.importorskip("typer")
    pytest.importorskip("torchrl")
    pytest.importorskip("pygame")

    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)

    def run(self, *arguments: str):
        from typer.testing import CliRunner

        from tdhook.cli.commands import app

        return CliRunner().invoke(app, [*arguments], prog_name="tdhook")

    def test_the_output_of_demo_is_shown(self) -> None:
        result = self.run("demo", "--steps", "12", "--frames", "--out", "out")
        assert result.exit_code == 0, result.output
        result = self.run("video", "out", "--fps", "20")
        assert result.exit_code == 0, result.output
        assert result.stdout == f"wrote {Path('out/video.mp4')}\n"
        assert len(read(Path("out/video.mp4"))) == 12
        result = self.run(
            "video", "out", "--out", "b.gif", "--every", "2", "--steps", "6", "--key", "observation"
        )
        assert result.exit_code == 0, result.output
        assert len(read(Path("b.gif"))) == 3
        assert (
            "pole angle"
            in json.loads(Path("out/summary.json").read_text())["explanations"][0]["mean_relevance"]
        )

    def test_a_rollout_without_frames_tells_what_to_run(self) -> None:
        assert self.run("demo", "--steps", "2", "--out", "out").exit_code == 0
        result = self.run("video", "out")
        assert result.exit_code == 2
        assert "has no frames to be shown: run tdhook explain (or tdhook demo) with --frames" in result.stderr
        result = self.run("video", "nowhere")
        assert result.exit_code == 2
        assert "nowhere is no output folder of tdhook" in result.stderr
        Path("out/summary.json").write_text("{")
        result = self.run("video", "out")
        assert result.exit_code == 2
        assert "out cannot be read" in result.stderr


def test_names_of_any_kind_are_drawn(tmp_path: Path) -> None:
    names = ["\ud800", "a\nb\x1b", "$x$"]
    source = rollout()
    source["attr"] = {"observation": torch.randn(5, 3)}
    source["observation"] = torch.randn(5, 3)
    path = write_video(source, tmp_path / "a.mp4", features=names, actions=["\ud800\n", "b\n"])
    assert len(read(path)) == 5


@pytest.mark.skipif(sys.platform == "win32", reason="there are no limits of size")
@pytest.mark.parametrize("name", ["a.mp4", "a.gif"])
def test_a_full_disk_leaves_the_video_before(tmp_path: Path, name: str) -> None:
    import resource

    path = tmp_path / name
    path.write_bytes(b"before")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match=f"{name} could not be written: ffmpeg .* Is the disk full"):
            write_video((torch.randint(0, 256, (20, 40, 40, 3), dtype=torch.uint8), torch.randn(20, 3)), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == b"before" and [entry.name for entry in tmp_path.iterdir()] == [name]
