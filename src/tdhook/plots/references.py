"""Reference frames of a unit on a sheet: what was seen, its relevance there, and the part that it sees, enlarged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from tdhook.extras import require
from tdhook.plots.frames import as_pictures, overlay, scale_of
from tdhook.plots.style import INK, draw_scale, draw_title, figure_class, finite, plain, top_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["reference_sheet"]

_SIDE = 1.7


def reference_sheet(
    frames: Tensor,
    relevance: Tensor,
    fields: Tensor | None = None,
    titles: Sequence[str] | None = None,
    title: str | None = None,
    *,
    scale: float | None = None,
    columns: int = 8,
) -> Figure:
    """Frames that a unit responds to, and beneath each the part that the unit sees, in red (for) and blue (against).

    All have one scale of colours, with zero, which is transparent, in its middle.

    Args:
        frames: ``[n, height, width, 3]`` or what else :func:`~tdhook.plots.overlay` takes.
        relevance: that which passes the unit, ``[n, height, width]``.
        fields: boxes around what it sees, ``[n, 2, 2]``: the first row and column, and those after the last.
        titles: one for each frame.
        title: of the figure.
        scale: relevance of the darkest colour; by default the 99.5th percentile of its size.
        columns: how many are shown in a row.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there is no frame, or shapes and titles do not fit together.
    """
    pictures = as_pictures(frames)
    amounts = finite(relevance, "relevance on frames", "[n, rows, columns] (summed over channels)", 3)
    count, (height, width) = len(pictures), pictures.shape[1:3]
    if titles is not None and len(titles) != count:
        raise ValueError(f"there are {count} frames, and {len(titles)} titles were given")
    if fields is not None and fields.shape != (count, 2, 2):
        raise ValueError(f"fields of {count} frames are [{count}, 2, 2], got {list(fields.shape)}")
    top = top_of(amounts) if scale is None else scale
    drawn = overlay(pictures, amounts, scale=top)
    columns = min(columns, count)
    each = 1 if fields is None else 2
    rows = -(-count // columns) * each
    figure: Figure = figure_class()(
        figsize=(max(4.2, _SIDE * columns), (_SIDE * height / width + 0.25) * rows + 0.9 + 0.3 * bool(title)),
        layout="compressed",
    )
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for i in range(count):
        axes = grid[i // columns * each, i % columns]
        axes.imshow(drawn[i].numpy(), interpolation="nearest")
        plain(axes, "" if titles is None else titles[i])
        if fields is None:
            continue
        (above, left), (below, right) = fields[i].tolist()
        patch = require("matplotlib.patches", "tdhook.plots").Rectangle(
            (left - 0.5, above - 0.5), right - left, below - above, fill=False, edgecolor=INK, linewidth=1.0
        )
        axes.add_patch(patch)
        grid[i // columns * each + 1, i % columns].imshow(
            drawn[i, above:below, left:right].numpy(), interpolation="nearest"
        )
    draw_scale(figure, scale_of(amounts, top), ax=grid, shrink=min(1.0, 1.6 / columns), aspect=30, pad=0.03)
    draw_title(figure, title)
    return figure
