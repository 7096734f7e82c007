"""Figures of a page that stand still, as HTML: ranges of a distribution, maps of points, small pictures."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tdhook.pages.pictures import png
from tdhook.pages.provenance import number, text_html

__all__ = [
    "COLOURS",
    "bars_svg",
    "cloud_svg",
    "field_html",
    "heat_html",
    "picture_html",
    "ranges_svg",
    "words_html",
]

COLOURS = 8
"""How many colours there are for groups and clusters; the ninth has that of the first."""
_FOR, _AGAINST = (178, 24, 43), (33, 102, 172)
_BOX = (20, 20, 20)
_LINE = 2
_SHOWN = 130
"""Pixels of the screen that a picture in a gallery has about."""
_SHARPEST = 0.995
_STRENGTHS = 8
"""How many strengths of a colour words are shown on."""


def ranges_svg(names: Sequence[str], groups: Sequence[str], quantiles: Tensor) -> str:
    """Ranges of each feature by group: 1 to 99 per cent as a line, 25 to 75 as a bar, and the median.

    The scale is logarithmic with a sign, and linear near zero.

    Args:
        names: of the features.
        groups: of the rows.
        quantiles: ``[groups, features, 5]``, of 1, 25, 50, 75 and 99 per cent.
    """
    size = quantiles.abs()
    unit = max(size[..., [1, 3]].mean().item(), size.max().item() * 1e-4, 1e-30)
    reach = max(_bent(size.max().item(), unit), 1e-9)
    left, width, row = 190, 560, 15

    def at(value: float) -> float:
        return left + width / 2 * (1 + _bent(value, unit) / reach)

    height = 24 + sum(8 + row * len(groups) for _ in names)
    parts = [f'<line class="zero" x1="{at(0):.1f}" x2="{at(0):.1f}" y1="0" y2="{height - 22}"/>']
    for tick in _ticks(size.max().item(), unit):
        parts.append(
            f'<line class="grid" x1="{at(tick):.1f}" x2="{at(tick):.1f}" y1="0" y2="{height - 22}"/>'
            f'<text class="tick" x="{at(tick):.1f}" y="{height - 8}">{number(tick)}</text>'
        )
    y = 4.0
    for i, name in enumerate(names):
        middle = y + row * len(groups) / 2 + 4
        parts.append(f'<text class="name" x="{left - 12}" y="{middle:.1f}">{text_html(name)}</text>')
        for group in range(len(groups)):
            low, lower, median, upper, high = (at(value) for value in quantiles[group, i].tolist())
            centre, colour = y + row / 2, f"c{group % COLOURS}"
            told = ", ".join(number(value) for value in quantiles[group, i].tolist())
            parts.append(
                f'<g class="{colour}"><title>{text_html(f"{name}, {groups[group]}: {told}")}</title>'
                f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{centre:.1f}" y2="{centre:.1f}"/>'
                f'<rect x="{lower:.1f}" y="{y + 2.5:.1f}" width="{max(1.5, upper - lower):.1f}" height="{row - 5}"/>'
                f'<line class="median" x1="{median:.1f}" x2="{median:.1f}" y1="{y + 1:.1f}" '
                f'y2="{y + row - 1:.1f}"/></g>'
            )
            y += row
        y += 8
    label = "Quantiles of relevance by feature and group"
    return (
        f'<svg class="ranges" role="img" aria-label="{label}" viewBox="0 0 {left + width + 20} {height}">'
        f"{''.join(parts)}</svg>"
    )


def _bent(value: float, unit: float) -> float:
    return math.asinh(value / unit)


def _ticks(most: float, unit: float) -> list[float]:
    """Powers of ten on both sides of zero, not nearer to each other than can be read."""
    top = math.floor(math.log10(most)) if most > 0 else 0
    sizes = [10.0**power for power in range(top, top - 12, -1) if 10.0**power >= unit * 1.5]
    kept = sizes[:: max(1, math.ceil(len(sizes) / 3))]
    return [*(-size for size in kept), 0.0, *reversed(kept)]


def cloud_svg(points: Tensor, label: Tensor) -> str:
    """A map of points, coloured by cluster.

    Args:
        points: ``[samples, 2]``.
        label: ``[samples]``.
    """
    low, high = points.amin(0), points.amax(0)
    placed = (points - low) / (high - low).clamp(min=1e-12) * torch.tensor([480.0, 300.0]) + 10
    dots = "".join(
        f'<circle class="c{one % COLOURS}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>'
        for (x, y), one in zip(placed.tolist(), label.tolist(), strict=True)
    )
    return (
        f'<svg class="cloud" role="img" aria-label="Map of explanations" viewBox="0 0 500 320">{dots}</svg>'
    )


def bars_svg(values: Sequence[float], marked: int) -> str:
    """Eigenvalues as bars, those before the gap marked."""
    top = max(*values, 1e-9)
    bars = "".join(
        f'<rect class="{"c0" if i < marked else "rest"}" x="{i * 22 + 4}" y="{62 - 56 * max(0.0, value) / top:.1f}" '
        f'width="16" height="{max(1.0, 56 * max(0.0, value) / top):.1f}"><title>{number(value)}</title></rect>'
        for i, value in enumerate(values)
    )
    return (
        f'<svg class="bars" role="img" aria-label="Smallest eigenvalues" viewBox="0 0 {len(values) * 22 + 4} 66">'
        f"{bars}</svg>"
    )


def picture_html(frame: Tensor, relevance: Tensor | None, caption: str) -> str:
    """A frame with its relevance on it, red for and blue against.

    Args:
        frame: ``[height, width, 3]``, bytes.
        relevance: ``[height, width]``.
        caption: what stands below.
    """
    shown = frame
    if relevance is not None:
        grey = frame.float().mean(-1, keepdim=True) * 0.55 + 90
        shown = _painted(relevance, grey.expand(*frame.shape))
    return _figure(shown, caption)


def field_html(frame: Tensor, relevance: Tensor, box: Tensor, caption: str) -> str:
    """A frame with relevance on it and a box around a part of it, and beneath it that part, enlarged.

    Args:
        frame: ``[height, width, 3]``, bytes.
        relevance: ``[height, width]``.
        box: the first row and column, and those after the last, ``[2, 2]``.
        caption: what stands below the frame.
    """
    grey = frame.float().mean(-1, keepdim=True) * 0.55 + 90
    shown = _painted(relevance, grey.expand(*frame.shape))
    (above, left), (below, right) = box.tolist()
    part = shown[above:below, left:right]
    zoom = -(-_SHOWN // min(frame.shape[:2]))  # so that the line is thin, and hides little
    large = shown.repeat_interleave(zoom, 0).repeat_interleave(zoom, 1)
    rows, columns = slice(above * zoom, below * zoom), slice(left * zoom, right * zoom)
    inside = large[rows, columns][_LINE:-_LINE, _LINE:-_LINE].clone()
    large[rows, columns] = torch.tensor(_BOX, dtype=torch.uint8)
    large[rows, columns][_LINE:-_LINE, _LINE:-_LINE] = inside
    where = f"rows {above} to {below - 1}, columns {left} to {right - 1}"
    return f'<div class="pair">{_figure(large, caption)}{_figure(part, where)}</div>'


def heat_html(relevance: Tensor, caption: str) -> str:
    """Relevance alone, ``[height, width]``, as a picture."""
    return _figure(_painted(relevance, torch.full((*relevance.shape, 3), 245.0)), caption)


def words_html(words: Sequence[str], relevance: Tensor, place: int | None, caption: str) -> str:
    """Words on the colour of their relevance, red for and blue against.

    Args:
        words: of the text.
        relevance: ``[words]``.
        place: the word that is underlined, if one is.
        caption: what stands below.
    """
    top, parts = relevance.abs().max().item() or 1.0, []
    for i, (word, amount) in enumerate(zip(words, relevance.tolist(), strict=True)):
        strength = round(_STRENGTHS * abs(amount) / top)
        colour = f"{'positive' if amount > 0 else 'negative'} s{strength}" if strength else ""
        kind = f"{colour} place".strip() if i == place else colour
        parts.append(f'<span class="{kind}" title="{number(amount)}">{text_html(word)}</span>')
    return f'<figure class="words"><p>{" ".join(parts)}</p><figcaption>{text_html(caption)}</figcaption></figure>'


def _painted(relevance: Tensor, ground: Tensor) -> Tensor:
    size = relevance.double().abs()
    top = size.flatten().quantile(_SHARPEST).item() or size.max().item() or 1.0
    strength = (size / top).clamp(max=1)[..., None].float() ** 0.8
    colour = torch.where(
        (relevance > 0)[..., None],
        torch.tensor(_FOR, dtype=torch.float),
        torch.tensor(_AGAINST, dtype=torch.float),
    )
    return (ground * (1 - strength) + colour * strength).round().clamp(0, 255).to(torch.uint8)


def _figure(picture: Tensor, caption: str) -> str:
    data = base64.b64encode(png(picture.contiguous())).decode("ascii")
    height, width, _ = picture.shape
    return (
        f'<figure><img class="coarse" width="{width}" height="{height}" alt="{text_html(caption)}" '
        f'src="data:image/png;base64,{data}"><figcaption>{text_html(caption)}</figcaption></figure>'
    )
