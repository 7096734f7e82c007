"""Relevance of one vector: bars of named features, a profile over positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tdhook.plots.style import (
    AGAINST,
    FAINT,
    FOR,
    INK,
    colour_of,
    draw_legend,
    draw_title,
    figure_class,
    finite,
    largest,
    plain,
    require_names,
    verbatim,
)

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["relevance_bars", "relevance_profile"]

_POINTS = 1000
"""About how many positions have room; where there are more, a point is the mean of several."""


def relevance_bars(
    relevance: Tensor, features: Sequence[str], title: str | None = None, *, max_features: int = 16
) -> Figure:
    """Relevance of named features, as bars: of one step, or the mean of many.

    Args:
        relevance: ``[features]``.
        features: one name per feature.
        title: of the figure.
        max_features: how many bars there are: those of largest size; the rest is summed in one more.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there is nothing to draw, or shape and names do not fit together.
    """
    relevance = finite(relevance, "relevance of features", "[features]", 1)
    features = require_names(features, len(relevance), "features")
    shown = largest(relevance.abs(), max_features)
    labels, values = [features[i] for i in shown], relevance[shown].tolist()
    if len(shown) < len(features):
        labels.append(f"{len(features) - len(shown)} others (sum)")
        values.append(relevance.sum().item() - sum(values))
    figure: Figure = figure_class()(
        figsize=(7.0, 0.6 + 0.36 * len(values) + 0.35 * bool(title)), layout="constrained"
    )
    axes = figure.subplots()
    bars = axes.barh(
        range(len(values)), values, height=0.7, color=[FOR if v > 0 else AGAINST for v in values]
    )
    axes.bar_label(bars, [f"{v:+.3g}" for v in values], padding=3, fontsize="small", color=INK)
    axes.axvline(0.0, color=INK, linewidth=0.8)
    axes.set_yticks(range(len(labels)), list(map(verbatim, labels)))
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlabel("relevance", fontsize="small", color=INK)
    plain(axes)
    draw_title(figure, title)
    return figure


def relevance_profile(
    relevance: Tensor | Mapping[str, Tensor],
    positions: Tensor | None = None,
    title: str | None = None,
    *,
    position_label: str = "step",
) -> Figure:
    """Relevance over positions that have an order: earlier steps, atoms of a distribution, places in a sequence.

    Args:
        relevance: ``[positions]``, drawn red where it speaks for the target and blue where against; or several of them
            by name, drawn as lines.
        positions: ``[positions]``, ascending; by default 0, 1, 2 and so on.
        title: of the figure.
        position_label: what the positions are.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there is nothing to draw, or not as many positions as values.
    """
    given = dict(relevance) if isinstance(relevance, Mapping) else {"": relevance}
    if not given:
        raise ValueError("there is nothing to draw: no relevance was given")
    lines = {
        name: finite(values, "relevance over positions", "[positions]", 1) for name, values in given.items()
    }
    count = len(next(iter(lines.values())))
    places = torch.arange(count) if positions is None else torch.as_tensor(positions).detach().cpu()
    places = places.to(torch.float64)
    for name, values in lines.items():
        if places.shape != values.shape:
            of = f" of {name!r}" if name else ""
            raise ValueError(
                f"there are {len(values)} values{of} for positions of shape {tuple(places.shape)}"
            )
    figure: Figure = figure_class()(figsize=(8.5, 3.0 + 0.3 * bool(title)), layout="constrained")
    axes = figure.subplots()
    x = _thinned(places)
    if isinstance(relevance, Mapping):
        drawn: list[Artist] = []
        for i, (name, values) in enumerate(lines.items()):
            drawn += axes.plot(x, _thinned(values), color=colour_of(i), label=name, linewidth=1.4)
        draw_legend(axes, drawn, list(lines))
    else:
        _fill(axes, x, _thinned(lines[""]))
    axes.axhline(0.0, color=INK, linewidth=0.8)
    axes.grid(axis="y", color=FAINT, linewidth=0.5)
    axes.set_axisbelow(True)
    axes.margins(x=0.01)
    axes.set_xlabel(verbatim(position_label), fontsize="small", color=INK)
    plain(axes, "relevance")
    draw_title(figure, title)
    return figure


def _thinned(values: Tensor) -> list[float]:
    return [part.mean().item() for part in values.split(max(1, len(values) // _POINTS))]


def _fill(axes: Axes, x: list[float], y: list[float]) -> None:
    if len(x) <= 100:
        nearest = min((b - a for a, b in pairwise(x)), default=1.0)
        axes.bar(x, y, width=0.8 * nearest, color=[FOR if value > 0 else AGAINST for value in y])
        return
    axes.fill_between(x, y, where=[value > 0 for value in y], color=FOR, linewidth=0, step="mid")
    axes.fill_between(x, y, where=[value < 0 for value in y], color=AGAINST, linewidth=0, step="mid")
