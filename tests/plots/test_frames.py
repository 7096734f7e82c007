"""Pictures of frames, matrices, vectors, words and trainings: what is drawn, not how it looks."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("matplotlib")

from tdhook.plots import (
    RELEVANCE_COLOURS,
    overlay,
    relevance_bars,
    relevance_during_training,
    relevance_matrix,
    relevance_of_tokens,
    relevance_on_frames,
    relevance_profile,
)
from tdhook.plots.style import colours_of, top_of

FRAMES = torch.randint(0, 256, (2, 6, 8, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
RELEVANCE = torch.zeros(2, 6, 8)


def texts(figure) -> list[str]:
    import matplotlib.text

    figure.canvas.draw()
    return [text.get_text() for text in figure.findobj(matplotlib.text.Text) if text.get_text()]


def pictures(figure) -> list[Tensor]:
    found = [image.get_array() for axes in figure.axes for image in axes.images]
    return [torch.as_tensor(array) for array in found if array.ndim == 3]


def test_colours_are_those_of_matplotlib() -> None:
    import matplotlib

    relevance = torch.linspace(-3.0, 3.0, 101)
    theirs = matplotlib.colormaps[RELEVANCE_COLOURS](((relevance / 2.0).clamp(-1, 1) + 1).numpy() / 2)[:, :3]
    assert torch.allclose(colours_of(relevance, 2.0) / 255.0, torch.as_tensor(theirs).float(), atol=0.02)


def test_the_scale_ends_where_nearly_all_values_lie() -> None:
    relevance = torch.ones(1000)
    relevance[0] = -1e6
    assert top_of(relevance) == 1.0
    relevance = torch.zeros(1000)
    assert top_of(relevance) == 1.0
    relevance[5] = -0.25
    assert top_of(relevance) == 0.25


def test_without_relevance_the_frame_is_grey_and_pale() -> None:
    shown = overlay(FRAMES, RELEVANCE, contrast=0.5)
    assert shown.dtype == torch.uint8 and shown.shape == FRAMES.shape
    assert bool((shown == shown[..., :1]).all())
    grey = FRAMES.float() @ torch.tensor([0.299, 0.587, 0.114])
    assert torch.allclose(shown[..., 0].float(), 255.0 - (255.0 - grey) / 2, atol=0.6)


def test_red_speaks_for_and_blue_against_and_more_is_stronger() -> None:
    relevance = RELEVANCE.clone()
    relevance[0, 0] = torch.tensor([0.1, 0.4, 0.7, 1.0, -0.1, -0.4, -0.7, -1.0])
    red, _, blue = overlay(FRAMES * 0 + 200, relevance, scale=1.0)[0, 0].long().unbind(-1)
    assert bool((red[:4] > blue[:4]).all()) and bool((blue[4:] > red[4:]).all())
    light = overlay(FRAMES * 0 + 200, relevance, scale=1.0)[0, 0].long().sum(-1)
    assert bool((light[:4].diff() < 0).all()) and bool((light[4:].diff() < 0).all())


@pytest.mark.parametrize("size", [(3, 4), (2, 2), (6, 8), (1, 1)])
def test_coarse_relevance_is_drawn_in_blocks(size: tuple[int, int]) -> None:
    relevance = torch.arange(1.0, 1 + size[0] * size[1]).reshape(1, *size)
    shown = overlay(FRAMES[:1] * 0, relevance)
    blocks = relevance.repeat_interleave(6 // size[0], 1).repeat_interleave(8 // size[1], 2)
    assert torch.equal(shown, overlay(FRAMES[:1] * 0, blocks, scale=top_of(relevance)))


def test_frames_of_any_make_give_the_same_picture() -> None:
    relevance = torch.randn(2, 6, 8)
    grey = FRAMES[..., :1]
    expected = overlay(FRAMES, relevance)
    assert torch.equal(overlay(FRAMES.movedim(-1, 1), relevance), expected)
    assert torch.equal(overlay(FRAMES.float() / 255.0, relevance), expected)
    assert torch.equal(overlay(FRAMES.numpy(), relevance.numpy()), expected)
    expected = overlay(grey.expand(FRAMES.shape), relevance)
    for other in (grey, grey.squeeze(-1), grey.movedim(-1, 1)):
        assert torch.equal(overlay(other, relevance), expected)
    assert torch.equal(overlay(grey > 99, relevance), overlay((grey > 99).float(), relevance))


def test_nothing_of_the_callers_is_changed() -> None:
    frames, relevance = FRAMES.clone(), torch.randn(2, 6, 8, requires_grad=True)
    before = relevance.detach().clone()
    shown = overlay(frames, relevance)
    assert torch.equal(frames, FRAMES) and torch.equal(relevance.detach(), before)
    assert not shown.requires_grad


@pytest.mark.parametrize(
    "frames, relevance, message",
    [
        (torch.zeros(0, 6, 8, 3), torch.zeros(0, 6, 8), r"there is nothing to draw: frames have shape \(0,"),
        (torch.zeros(2, 4, 6, 8), RELEVANCE, r"frames have shape .* got \(2, 4, 6, 8\). Of stacked frames"),
        (torch.zeros(6, 8), RELEVANCE, r"frames have shape .* got \(6, 8\)"),
        (FRAMES.float(), RELEVANCE, r"values from 0 to 1, and these have \d+ to 2\d\d: rescale them"),
        (FRAMES.long(), RELEVANCE, "frames are torch.uint8, or floating point from 0 to 1, got torch.int64"),
        (FRAMES, RELEVANCE[:1], "there are 2 frames, and relevance of 1"),
        (FRAMES, RELEVANCE.unsqueeze(1), r"relevance on frames has shape \[n, rows, columns\].* \(2, 1, 6, 8\)"),
        (FRAMES, torch.zeros(2, 12, 8), r"relevance is finer than the frames: \(12, 8\) on \(6, 8\)"),
        (FRAMES, RELEVANCE / 0, "relevance has NaN or infinite values"),
    ],
)  # fmt: skip
def test_what_cannot_be_laid_over_frames_is_told(frames: Tensor, relevance: Tensor, message: str) -> None:
    for draw in (overlay, relevance_on_frames):
        with pytest.raises(ValueError, match=message):
            draw(frames, relevance)


def test_frames_are_drawn_side_by_side_in_one_scale() -> None:
    relevance = torch.zeros(2, 3, 4)
    relevance[0], relevance[1] = 2.0, -0.5
    figure = relevance_on_frames(FRAMES, relevance, ["before", "after"], "A game")
    shown = pictures(figure)
    assert len(shown) == 2
    assert torch.equal(torch.stack(shown), overlay(FRAMES, relevance, scale=2.0))
    written = texts(figure)
    for text in ("before", "after", "A game", "against ← relevance → for", "−2", "0", "2"):
        assert text in written


def test_of_many_frames_some_are_shown(tmp_path: Path) -> None:
    frames = torch.zeros(10_000, 4, 4)
    figure = relevance_on_frames(frames, frames, max_frames=5, columns=3)
    assert len(pictures(figure)) == 5
    written = texts(figure)
    assert {"frame 0", "frame 2500", "frame 9999"} <= set(written)
    figure = relevance_on_frames(FRAMES[:1], RELEVANCE[:1])
    figure.savefig(tmp_path / "one.png")
    assert (tmp_path / "one.png").stat().st_size > 1_000
    with pytest.raises(ValueError, match="there are 2 frames, and 1 titles were given"):
        relevance_on_frames(FRAMES, RELEVANCE, ["only"])


def test_a_matrix_has_names_and_its_values() -> None:
    figure = relevance_matrix(
        torch.tensor([[1.0, -0.25], [0.0, 3.0]]), ["a", "b"], ["c", "d"], "Who", "acts", "sees"
    )
    written = texts(figure)
    for text in ("a", "b", "c", "d", "Who", "acts", "sees", "1", "-0.25", "0", "3"):
        assert text in written
    image = figure.axes[0].images[0]
    assert image.get_array().tolist() == [[1.0, -0.25], [0.0, 3.0]]
    assert image.get_clim() == (-3.0, 3.0)


def test_a_large_matrix_has_means_of_neighbours_and_some_of_the_names() -> None:
    relevance = torch.arange(10_000.0).repeat(30, 1)
    figure = relevance_matrix(
        relevance, [f"agent {i}" for i in range(30)], [str(i) for i in range(10_000)], scale=1.0
    )
    drawn = figure.axes[0].images[0].get_array()
    assert drawn.shape == (30, 1_000)
    assert drawn[0, :2].tolist() == [4.5, 14.5]
    written = texts(figure)
    assert "agent 29" in written and "0" in written and "4.5" not in written
    assert len(figure.axes[0].get_xticks()) <= 40


@pytest.mark.parametrize(
    "relevance, message",
    [
        (torch.zeros(0, 2), "there is nothing to draw"),
        (torch.zeros(2), r"a matrix of relevance has shape \[rows, columns\], got \(2,\)"),
        (torch.zeros(1, 2), "relevance has 1 rows, and 2 names were given"),
        (torch.zeros(2, 3), "relevance has 3 columns, and 2 names were given"),
    ],
)
def test_what_is_no_matrix_is_told(relevance: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        relevance_matrix(relevance, ["a", "b"], ["c", "d"])


def panels(figure) -> dict[str, object]:
    return {axes.get_title(loc="left"): axes for axes in figure.axes}


def test_a_training_has_a_panel_for_each_kind() -> None:
    history = {
        "step": [0.0, 100.0, 200.0],
        "relevance/angle": [1.0, 2.0, 3.0],
        "drift": [math.nan, 0.5, 0.75],
        "relevance/velocity": [-1.0, 0.0, 1.0],
    }
    figure = relevance_during_training(history, "Training", step_label="frames")
    drawn = panels(figure)
    assert list(drawn) == ["relevance", "drift"]
    lines = {line.get_label(): line for line in drawn["relevance"].lines if line.get_label()[0] != "_"}
    assert list(lines) == ["angle", "velocity"]
    assert list(lines["velocity"].get_ydata()) == [-1.0, 0.0, 1.0]
    assert list(lines["velocity"].get_xdata()) == [0.0, 100.0, 200.0]
    (drift,) = drawn["drift"].lines
    assert math.isnan(drift.get_ydata()[0]) and list(drift.get_ydata()[1:]) == [0.5, 0.75]
    assert {"Training", "frames", "angle", "velocity"} <= set(texts(figure))


def test_of_many_features_the_largest_have_a_line() -> None:
    history = {"step": [0, 1], **{f"relevance/x{i}": [float(i), -float(i)] for i in range(12)}}
    drawn = panels(relevance_during_training(history, max_lines=3))
    axes = drawn["relevance (the 3 largest of 12)"]
    assert [line.get_label() for line in axes.lines if line.get_label()[0] != "_"] == ["x9", "x10", "x11"]


@pytest.mark.parametrize("steps", [1, 2, 10_000])
def test_a_training_of_any_length_is_drawn(tmp_path: Path, steps: int) -> None:
    history = {"step": range(steps), "return": torch.arange(steps).double(), "never": [math.nan] * steps}
    figure = relevance_during_training(history)
    figure.savefig(tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1_000
    (line,) = (line for line in panels(figure)["return"].lines)
    assert len(line.get_xdata()) == min(steps, 1_000)
    assert line.get_ydata()[0] == (4.5 if steps == 10_000 else 0.0)


@pytest.mark.parametrize(
    "history, message",
    [
        ({"drift": [1.0]}, r'the history has an entry "step", .* got \[\'drift\'\]'),
        ({"step": [0.0]}, "there is nothing to draw"),
        ({"step": [], "drift": []}, "there is nothing to draw: 0 steps of"),
        ({"step": [0.0], "drift": [1.0, 2.0]}, r"'drift' has shape \(2,\), and 'step' \(1,\)"),
    ],
)
def test_what_is_no_history_is_told(history: dict[str, list[float]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        relevance_during_training(history)


def test_bars_show_the_largest_and_the_rest() -> None:
    figure = relevance_bars(torch.tensor([1.0, -3.0, 0.5, 2.0]), ["a", "b", "c", "d"], "Mean", max_features=2)
    assert [bar.get_width() for bar in figure.axes[0].patches] == [-3.0, 2.0, 1.5]
    assert {"b", "d", "2 others (sum)", "-3", "+2", "+1.5", "Mean"} <= set(texts(figure))
    with pytest.raises(ValueError, match="relevance has 2 features, and 1 names were given"):
        relevance_bars(torch.zeros(2), ["a"])
    with pytest.raises(ValueError, match="there is nothing to draw"):
        relevance_bars(torch.zeros(0), [])


@pytest.mark.parametrize("count", [1, 2, 101, 10_000])
def test_a_profile_of_any_length_is_drawn(tmp_path: Path, count: int) -> None:
    relevance_profile(torch.randn(count), title="Atoms").savefig(tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1_000


def test_profiles_may_be_compared() -> None:
    lines = {"LSTM": torch.arange(4.0), "GRU": -torch.arange(4.0)}
    axes = relevance_profile(lines, torch.arange(-3, 1)).axes[0]
    drawn = {line.get_label(): line for line in axes.lines}
    assert list(drawn["GRU"].get_ydata()) == [0.0, -1.0, -2.0, -3.0]
    assert list(drawn["GRU"].get_xdata()) == [-3.0, -2.0, -1.0, 0.0]
    bars = relevance_profile(torch.tensor([1.0, -2.0])).axes[0].patches
    assert [bar.get_height() for bar in bars] == [1.0, -2.0]
    assert bars[0].get_facecolor()[0] > 0.5 > bars[1].get_facecolor()[0]  # red, and not
    with pytest.raises(ValueError, match=r"there are 4 values of 'LSTM' for positions of shape \(3,\)"):
        relevance_profile(lines, torch.arange(3))
    with pytest.raises(ValueError, match="no relevance was given"):
        relevance_profile({})


def test_words_stand_on_the_colour_of_their_relevance() -> None:
    words = [["the", " cat", "costs\n", "$5"], ["yes"]]
    figure = relevance_of_tokens(words, [torch.tensor([1.0, -1.0, 0.0, 0.5]), torch.ones(1)], ["→ a", "→ b"])
    axes = figure.axes[0]
    assert {"the", "cat", "costs⏎", r"\$5", "yes", "→ a", "→ b"} <= set(texts(figure))
    boxes = [torch.as_tensor(boxes.get_facecolor())[:, :3].float() for boxes in axes.collections]
    assert torch.allclose(boxes[0] * 255.0, colours_of(torch.tensor([1.0, -1.0, 0.0, 0.5]), 1.0), atol=0.5)


def test_long_texts_are_wrapped_and_very_long_ones_begin_later() -> None:
    figure = relevance_of_tokens([["word"] * 50], [torch.ones(50)], width=4.0)
    lines = {text.get_position()[1] for text in figure.axes[0].texts}
    assert len(lines) > 5
    shown = texts(relevance_of_tokens([[f"w{i}" for i in range(10)]], [torch.ones(10)], max_tokens=3))
    assert "… 7 before (sum)" in shown and "w7" in shown and "w6" not in shown


@pytest.mark.parametrize(
    "tokens, relevance, error, message",
    [
        ([], [], ValueError, "no text was given"),
        ([[]], [torch.zeros(0)], ValueError, "there is nothing to draw"),
        (["ab"], [torch.zeros(2)], TypeError, r"give a single text as \[tokens\], \[relevance\]"),
        ([["a"]], [], ValueError, "there are 1 texts, and relevance of 0"),
        ([["a"]], [torch.zeros(2)], ValueError, "relevance has 2 tokens, and 1 names were given"),
    ],
)
def test_what_is_no_text_is_told(
    tokens: list[list[str]], relevance: list[Tensor], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        relevance_of_tokens(tokens, relevance)
