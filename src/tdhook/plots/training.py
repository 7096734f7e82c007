"""What attribution did while an agent was trained."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tdhook.plots.style import (
    FAINT,
    INK,
    colour_of,
    draw_legend,
    draw_title,
    figure_class,
    largest,
    plain,
    verbatim,
)

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["relevance_during_training"]

_POINTS = 1000
"""About how many points a line has; of more, it shows means, and a band their range."""


def relevance_during_training(
    history: Mapping[str, Sequence[float]],
    title: str | None = None,
    *,
    step_label: str = "step",
    max_lines: int = 8,
) -> Figure:
    """Lines over the course of a training, one panel for each kind of quantity.

    What a name has before its last ``/`` is its kind: ``relevance/angle`` and ``relevance/velocity`` are two lines of
    the panel ``relevance``; ``drift`` or ``return`` is a panel of its own.

    Args:
        history: ``"step"``, when something was recorded, and beside it any number of quantities, each as long; NaN
            where one was not recorded.
        title: of the figure.
        step_label: what the steps are, as ``"frames"``.
        max_lines: of how many lines a panel has room: those that are largest in size on average.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there is no step, no quantity, or one of another length.
    """
    steps, kinds = _checked(history)
    heights = [1.0 + 0.16 * min(len(lines), max_lines) for lines in kinds.values()]
    figure: Figure = figure_class()(figsize=(8.5, 0.9 + 1.25 * sum(heights)), layout="constrained")
    panels = figure.subplots(
        len(kinds), 1, squeeze=False, sharex=True, gridspec_kw={"height_ratios": heights}
    )[:, 0]
    for axes, (kind, lines) in zip(panels, kinds.items(), strict=True):
        _draw(axes, steps, kind, lines, max_lines)
    panels[-1].set_xlabel(verbatim(step_label), fontsize="small", color=INK)
    draw_title(figure, title)
    return figure


def _checked(history: Mapping[str, Sequence[float]]) -> tuple[Tensor, dict[str, dict[str, Tensor]]]:
    """The steps, and the lines of each kind."""
    if "step" not in history:
        raise ValueError(
            f'the history has an entry "step", when each value was recorded; got {sorted(history)}'
        )
    steps = torch.as_tensor(history["step"], dtype=torch.float64).detach().cpu()
    kinds: dict[str, dict[str, Tensor]] = {}
    for name, values in history.items():
        if name == "step":
            continue
        line = torch.as_tensor(values, dtype=torch.float64).detach().cpu()
        if line.shape != steps.shape:
            raise ValueError(f"{name!r} has shape {tuple(line.shape)}, and 'step' {tuple(steps.shape)}")
        kind, _, label = name.rpartition("/")
        kinds.setdefault(kind or name, {})[label] = line
    if len(steps) == 0 or not kinds:
        raise ValueError(f"there is nothing to draw: {len(steps)} steps of {sorted(history)}")
    return steps, kinds


def _draw(axes: Axes, steps: Tensor, kind: str, lines: dict[str, Tensor], most: int) -> None:
    labels = list(lines)
    sizes = torch.stack([line.abs().nanmean() for line in lines.values()]).nan_to_num(-1.0)
    shown = largest(sizes, most)
    drawn: list[Artist] = []
    for place, i in enumerate(shown):
        drawn.append(_draw_line(axes, steps, lines[labels[i]], labels[i], colour_of(place)))
    seen = torch.cat([line[line.isfinite()] for line in lines.values()])
    if bool((seen < 0.0).any()):
        axes.axhline(0.0, color=INK, linewidth=0.8)
    axes.grid(axis="y", color=FAINT, linewidth=0.5)
    axes.margins(x=0.01)
    rest = f" (the {len(shown)} largest of {len(labels)})" if len(shown) < len(labels) else ""
    plain(axes, kind + rest)
    if len(labels) > 1:
        draw_legend(axes, drawn, [labels[i] for i in shown], loc="center left", bbox_to_anchor=(1.01, 0.5))


def _draw_line(axes: Axes, steps: Tensor, line: Tensor, label: str, colour: str) -> Artist:
    together = max(1, len(steps) // _POINTS)
    marker = "." if len(steps) < 40 else None
    if together > 1:
        axes.fill_between(
            [part.mean().item() for part in steps.split(together)],
            [_or_nan(part, "min") for part in line.split(together)],
            [_or_nan(part, "max") for part in line.split(together)],
            color=colour,
            alpha=0.2,
            linewidth=0,
        )
    (drawn,) = axes.plot(
        [part.mean().item() for part in steps.split(together)],
        [part.nanmean().item() for part in line.split(together)],
        color=colour,
        label=label,
        linewidth=1.4,
        marker=marker,
    )
    return drawn


def _or_nan(part: Tensor, what: str) -> float:
    part = part[part.isfinite()]
    if len(part) == 0:
        return math.nan
    return (part.min() if what == "min" else part.max()).item()
