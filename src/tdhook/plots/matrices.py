"""Relevance as a matrix: of agents on agents, of actions on earlier steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tdhook.plots.style import (
    INK,
    RELEVANCE_COLOURS,
    draw_scale,
    draw_title,
    figure_class,
    finite,
    plain,
    require_names,
    top_of,
    verbatim,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["relevance_matrix"]

_LETTER = 0.085  # width of a letter of a name in inches
_WRITTEN = 12
"""Up to how many columns have their values written into them."""
_LANES = 1000
"""About how many rows or columns have room; where there are more, several share one."""


def relevance_matrix(
    relevance: Tensor,
    rows: Sequence[str],
    columns: Sequence[str],
    title: str | None = None,
    row_label: str | None = None,
    column_label: str | None = None,
    *,
    scale: float | None = None,
) -> Figure:
    """Relevance as a matrix, as that of each agent's observation (columns) for each agent's action (rows).

    Where there are few cells, each has its value in it. Where there are more rows or columns than room, a cell shows
    the mean of several.

    Args:
        relevance: ``[rows, columns]``.
        rows: one name per row.
        columns: one name per column.
        title: of the figure.
        row_label: what the rows are.
        column_label: what the columns are.
        scale: relevance of the darkest colour; by default the 99.5th percentile of its size.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there is nothing to draw, or shape and names do not fit together.
    """
    relevance = finite(relevance, "a matrix of relevance", "[rows, columns]", 2)
    rows = require_names(rows, relevance.shape[0], "rows")
    columns = require_names(columns, relevance.shape[1], "columns")
    values = _thinned(_thinned(relevance, 0), 1)
    top = top_of(values) if scale is None else scale
    height, width = values.shape
    written = width <= _WRITTEN and height <= 2 * _WRITTEN
    named = _LETTER * max(map(len, columns))  # width of a name in inches
    if written:
        cell = (min(max(0.85, named), 1.7), 0.5)
    else:
        cell = (min(0.5, 9.0 / width), min(0.42, 6.0 / height))
    figure: Figure = figure_class()(
        figsize=(max(4.0, 1.8 + cell[0] * width), max(2.2, 1.5 + cell[1] * height) + 0.3 * bool(title)),
        layout="constrained",
    )
    axes = figure.subplots()
    image = axes.imshow(
        values.numpy(),
        aspect="auto",
        cmap=RELEVANCE_COLOURS,
        vmin=-top,
        vmax=top,
        interpolation="nearest",
        extent=(-0.5, len(columns) - 0.5, len(rows) - 0.5, -0.5),
    )
    plain(axes)
    _name(axes, rows, columns, slanted=named > cell[0] and len(columns) * named > 9.0)
    if max(height, width) <= 40:
        _separate(axes, height, width)
    if written:
        _write(axes, values, top)
    axes.set_ylabel(verbatim(row_label or ""), fontsize="small", color=INK)
    axes.set_xlabel(verbatim(column_label or ""), fontsize="small", color=INK)
    draw_scale(figure, image, ax=axes, shrink=min(1.0, 3.0 / figure.get_figwidth()), aspect=25, pad=0.04)
    draw_title(figure, title)
    return figure


def _thinned(values: Tensor, axis: int) -> Tensor:
    """Means of neighbours along an axis, where there are too many to be seen."""
    together = max(1, values.shape[axis] // _LANES)
    return torch.stack([part.mean(axis) for part in values.split(together, axis)], axis)


def _name(axes: Axes, rows: Sequence[str], columns: Sequence[str], slanted: bool) -> None:
    """Names of rows and columns, of as many as there is room for."""
    every = -(-len(rows) // 32)
    axes.set_yticks(range(0, len(rows), every), list(map(verbatim, rows[::every])))
    every = -(-len(columns) // (40 if slanted or max(map(len, columns)) <= 3 else 16))
    axes.set_xticks(range(0, len(columns), every), list(map(verbatim, columns[::every])))
    if slanted:
        axes.tick_params(axis="x", labelrotation=35)
        for label in axes.get_xticklabels():
            label.set(horizontalalignment="right", rotation_mode="anchor")


def _separate(axes: Axes, height: int, width: int) -> None:
    for edge in range(1, height):
        axes.axhline(edge - 0.5, color="white", linewidth=1.5)
    for edge in range(1, width):
        axes.axvline(edge - 0.5, color="white", linewidth=1.5)


def _write(axes: Axes, values: Tensor, top: float) -> None:
    for i, row in enumerate(values.tolist()):
        for j, value in enumerate(row):
            ink = "white" if abs(value) > 0.6 * top else INK
            axes.text(j, i, f"{value:.2g}", ha="center", va="center", fontsize="small", color=ink)
