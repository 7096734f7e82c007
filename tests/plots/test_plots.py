"""Pictures: what is drawn, not how it looks."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("matplotlib")

from matplotlib.figure import Figure
from matplotlib.text import Text

from tdhook.plots import (
    relevance_bars,
    relevance_during_training,
    relevance_matrix,
    relevance_of_tokens,
    relevance_over_time,
    relevance_profile,
)

FEATURES = ("position", "velocity", "angle")
RELEVANCE = torch.tensor([[1.0, -2.0, 0.0], [0.5, 1.0, -0.25], [0.0, 0.0, 0.125]])
ACTIONS = torch.tensor([0, 1, 1])


def axes_by_title(figure) -> dict[str, object]:
    return {axes.get_title(loc="left"): axes for axes in figure.axes if axes.get_title(loc="left")}


def texts(figure) -> list[str]:
    import matplotlib.text

    figure.canvas.draw()
    return [text.get_text() for text in figure.findobj(matplotlib.text.Text)]


def test_the_picture_shows_relevance_actions_and_observation() -> None:
    figure = relevance_over_time(
        RELEVANCE, FEATURES, ACTIONS, ("left", "right"), torch.randn(3, 3), "An episode", episode_starts=[2]
    )
    parts = axes_by_title(figure)
    assert set(parts) == {"relevance", "mean by action", "observation"}
    image = parts["relevance"].images[0]
    assert image.get_array().T.tolist() == RELEVANCE.tolist()
    assert image.get_clim() == (-2.0, 2.0)  # symmetric: white is zero
    shown = texts(figure)
    for text in (*FEATURES, "left", "right", "An episode", "action", "step", "relevance"):
        assert text in shown
    bars = [bar.get_width() for bar in parts["mean by action"].patches]
    assert bars == pytest.approx([*RELEVANCE[0].tolist(), *RELEVANCE[1:].mean(0).tolist()])


def test_relevance_alone() -> None:
    figure = relevance_over_time(RELEVANCE, FEATURES)
    parts = axes_by_title(figure)
    assert set(parts) == {"relevance", "mean"}
    assert [bar.get_width() for bar in parts["mean"].patches] == pytest.approx(RELEVANCE.mean(0).tolist())


@pytest.mark.parametrize("time", [1, 2, 999, 2_500])
def test_any_length_is_drawn(tmp_path: Path, time: int) -> None:
    actions = torch.randint(0, 4, (time,))
    figure = relevance_over_time(torch.randn(time, 3), FEATURES, actions, None, torch.randn(time, 3))
    figure.savefig(tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1_000
    heat = axes_by_title(figure)["relevance" if time < 2_000 else "relevance (mean of 2 steps)"]
    assert heat.get_xlim() == (-0.5, time - 0.5)
    assert heat.images[0].get_array().shape == (3, time if time < 2_000 else 1_250)


def test_many_steps_are_averaged() -> None:
    relevance = torch.arange(2_001.0)[:, None]
    figure = relevance_over_time(relevance, ["x"], torch.zeros(2_001, dtype=torch.int64), ["only"], relevance)
    drawn = axes_by_title(figure)["relevance (mean of 2 steps)"].images[0].get_array()
    assert drawn[0, :2].tolist() == [0.5, 2.5]
    assert drawn[0, -1] == 2_000.0  # the last column has one step


def test_of_many_features_the_largest_are_shown() -> None:
    relevance = torch.ones(5, 40) * torch.arange(40)
    figure = relevance_over_time(
        relevance, [f"x{i}" for i in range(40)], observation=relevance, max_features=3
    )
    image = axes_by_title(figure)["relevance"].images[0]
    assert image.get_array()[:, 0].tolist() == [37.0, 38.0, 39.0, sum(range(37))]
    shown = texts(figure)
    assert "37 others (sum)" in shown
    assert "x39" in shown and "x36" not in shown


def test_no_relevance_at_all_is_white() -> None:
    image = axes_by_title(relevance_over_time(torch.zeros(4, 3), FEATURES))["relevance"].images[0]
    assert image.get_clim() == (-1.0, 1.0)


def test_one_outlier_does_not_hide_the_rest() -> None:
    relevance = torch.ones(500, 3)
    relevance[0, 0] = 1e6
    image = axes_by_title(relevance_over_time(relevance, FEATURES))["relevance"].images[0]
    assert image.get_clim() == (-1.0, 1.0)
    assert image.colorbar.extend == "max"


def test_nothing_global_is_touched() -> None:
    relevance_over_time(RELEVANCE, FEATURES).canvas.draw()
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or pyplot.get_fignums() == []


@pytest.mark.parametrize(
    "relevance, options, message",
    [
        (torch.zeros(0, 3), {}, r"there is nothing to draw: relevance has shape \(0, 3\)"),
        (torch.zeros(3), {}, r"relevance over time has shape \[time, features\], got \(3,\)"),
        (torch.zeros(2, 4), {}, "relevance has 4 features, and 3 names were given"),
        (torch.full((2, 3), torch.nan), {}, "relevance has NaN or infinite values"),
        (RELEVANCE, {"actions": ACTIONS[:2]}, "there are 2 actions for 3 steps"),
        (RELEVANCE, {"actions": ACTIONS - 1}, "an action is an index, and one of them is negative"),
        (
            RELEVANCE,
            {"actions": ACTIONS, "action_names": ["left"]},
            "action 1 was taken, and 1 action names were given",
        ),
        (
            RELEVANCE,
            {"observation": torch.zeros(3, 2)},
            r"the observation has shape \(3, 2\) and relevance \(3, 3\)",
        ),
    ],
)
def test_what_cannot_be_drawn_is_told(relevance: Tensor, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        relevance_over_time(relevance, FEATURES, **options)


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'tdhook\.plots needs matplotlib.*pip install "tdhook\[viz\]"'):
        relevance_over_time(RELEVANCE, FEATURES)


NAMES = ("$a$ $\\frac$", "_hidden", "\ud800\x00\nb")
WRITTEN = ("$a$ $\\frac$", "_hidden", "\\ud800\\x00\\nb")


@pytest.mark.parametrize(
    "draw",
    [
        lambda: relevance_over_time(
            RELEVANCE, NAMES, torch.tensor([0, 1, 2]), NAMES, torch.randn(3, 3), title=NAMES[0]
        ),
        lambda: relevance_bars(torch.ones(3), NAMES, title=NAMES[0]),
        lambda: relevance_profile({name: torch.arange(3.0) for name in NAMES}, position_label=NAMES[0]),
        lambda: relevance_matrix(torch.ones(3, 3), NAMES, NAMES, NAMES[0], NAMES[0], NAMES[0]),
        lambda: relevance_during_training(
            {"step": [0, 1], **{f"{NAMES[0]}/{name}": [0.0, 1.0] for name in NAMES}}, step_label=NAMES[0]
        ),
        lambda: relevance_of_tokens([NAMES], [torch.ones(3)], [NAMES[0]], NAMES[0]),
    ],
)
def test_names_are_shown_letter_by_letter(draw: Callable[[], Figure], tmp_path: Path) -> None:
    figure = draw()
    figure.savefig(tmp_path / "a.png")
    drawn = [text for text in figure.findobj(Text) if text.get_text()]
    shown = []
    for text in drawn:
        plain, is_formula = text._preprocess_math(text.get_text())
        assert not is_formula
        shown.append(plain.replace("⏎", "\\n"))
    assert set(WRITTEN) <= set(shown)
