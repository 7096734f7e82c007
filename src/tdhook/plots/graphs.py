"""Attribution graphs as pictures: layers side by side, units as circles, what they hand on as lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from tdhook.concepts import AttributionGraph, Node
from tdhook.plots.style import AGAINST, FOR, INK, RELEVANCE_COLOURS, draw_title, figure_class, verbatim

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["relevance_graph"]

_ROW, _COLUMN = 0.42, 2.2  # inches
_THICKEST = 6.0
_MOST = 400
"""How many lines are drawn, the thickest ones."""


def relevance_graph(
    graph: AttributionGraph, title: str | None = None, names: Mapping[str, Sequence[str]] | None = None
) -> Figure:
    """The units of each layer in a column, inputs to the left, and what each hands on to earlier ones.

    Circles are red where a unit speaks for the target and blue where it speaks against it; lines are as thick as what
    goes along them.

    Args:
        graph: of one element (``graph[0]``) or a mean (``graph.mean()``), and pruned where there are many units.
        title: of the figure.
        names: of units, by layer; by default their numbers.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: it is of several elements of a batch, or a layer has another number of units than names.
    """
    nodes, links = graph.nodes(), graph.links()
    for layer, given in (names or {}).items():
        count = graph.relevance[layer].shape[-1] if layer in graph.relevance else None
        if count != len(given):
            found = f"has {count} units" if count is not None else f"is none of {', '.join(graph.layers)}"
            raise ValueError(f"{len(given)} names are given for {layer!r}, which {found}")
    places = _places(graph.layers, list(nodes))
    rows = max((sum(node.layer == layer for node in nodes) for layer in graph.layers), default=1)
    figure: Figure = figure_class()(
        figsize=(max(4.0, _COLUMN * len(graph.layers)), max(2.4, _ROW * rows + 0.9) + 0.3 * bool(title)),
        layout="constrained",
    )
    axes = figure.subplots()
    axes.axis("off")
    top = max(map(abs, nodes.values()), default=0.0) or 1.0
    _draw_lines(axes, links, places)
    x, y = ([places[node][i] for node in nodes] for i in (0, 1))
    axes.scatter(
        x,
        y,
        c=list(nodes.values()),
        cmap=RELEVANCE_COLOURS,
        vmin=-top,
        vmax=top,
        s=170,
        edgecolors=INK,
        linewidths=0.7,
    )
    for node in nodes:
        name = names[node.layer][node.unit] if names and node.layer in names else str(node.unit)
        axes.annotate(
            verbatim(name),
            places[node],
            (0, -13),
            textcoords="offset points",
            ha="center",
            fontsize=6,
            color=INK,
        )
    for i, layer in enumerate(graph.layers):
        axes.annotate(verbatim(layer), (i, 0.9), ha="center", fontsize="small", color=INK)
    axes.set_ylim(-rows + 0.3, 1.3)
    axes.set_xlim(-0.5, len(graph.layers) - 0.5)
    draw_title(figure, title)
    return figure


def _places(layers: Sequence[str], nodes: Sequence[Node]) -> dict[Node, tuple[float, float]]:
    """Where each unit is drawn: a column for each layer, its units from the top."""
    most = max((sum(node.layer == layer for node in nodes) for layer in layers), default=1)
    found: dict[Node, tuple[float, float]] = {}
    for i, layer in enumerate(layers):
        ours = [node for node in nodes if node.layer == layer]
        spread = torch.linspace(0, -(most - 1), len(ours)).tolist() if len(ours) > 1 else [-(most - 1) / 2]
        found.update({node: (float(i), y) for node, y in zip(ours, spread, strict=False)})
    return found


def _draw_lines(
    axes: Axes, links: Mapping[tuple[Node, Node], float], places: Mapping[Node, tuple[float, float]]
) -> None:
    thickest = sorted(links.items(), key=lambda link: -abs(link[1]))[:_MOST]
    top = abs(thickest[0][1]) if thickest else 1.0
    for (above, below), amount in reversed(thickest):
        (x0, y0), (x1, y1) = places[below], places[above]
        axes.plot(
            [x0, x1],
            [y0, y1],
            color=FOR if amount > 0 else AGAINST,
            linewidth=max(0.2, _THICKEST * abs(amount) / top),
            alpha=0.55,
            zorder=0,
            solid_capstyle="round",
        )
