"""Words on the colour of their relevance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tdhook.markup import visible
from tdhook.plots.style import (
    INK,
    RELEVANCE_COLOURS,
    colours_of,
    draw_scale,
    draw_title,
    figure_class,
    finite,
    require_names,
    top_of,
    verbatim,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["relevance_of_tokens"]

_LETTER = 0.088  # width in inches of a letter of the monospaced font
_LINE = 0.3  # height of a line of text in inches
_GAP = 0.6  # between two tokens, in letters


def relevance_of_tokens(
    tokens: Sequence[Sequence[str]],
    relevance: Sequence[Tensor],
    labels: Sequence[str] | None = None,
    title: str | None = None,
    *,
    scale: float | None = None,
    width: float = 8.5,
    max_tokens: int = 1000,
) -> Figure:
    """Texts, each token on the colour of its relevance: red where it speaks for the target, blue where against.

    All texts have one scale. Long ones are wrapped; of very long ones the last tokens are shown, and the relevance of
    those before is summed in one.

    Args:
        tokens: for each text, its tokens. Give a single text as a list of one.
        relevance: for each text, ``[tokens]``.
        labels: what stands before each text, as the token that it explains.
        title: of the figure.
        scale: relevance of the darkest colour; by default the 99.5th percentile of its size.
        width: of the figure, in inches.
        max_tokens: how many tokens of a text are shown.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there is nothing to draw, or a text, its relevance and labels do not fit together.
        TypeError: a text is a string, and not a list of tokens.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    texts = _checked(tokens, relevance, max_tokens)
    if labels is not None and len(labels) != len(texts):
        raise ValueError(f"there are {len(texts)} texts, and {len(labels)} labels were given")
    amounts = torch.cat([values for _, values in texts])
    top = top_of(amounts) if scale is None else scale
    margin = 0.0 if labels is None else 1.5 + max(map(len, labels))
    room = width / _LETTER - margin - 2.0
    placed = [_place(words, room) for words, _ in texts]
    lines = sum(rows for _, rows in placed) + 0.4 * (len(texts) - 1)
    figure: Figure = figure_class()(
        figsize=(width, _LINE * lines + 0.75 + 0.35 * bool(title)), layout="constrained"
    )
    axes = figure.subplots()
    axes.set(xlim=(-1.0, width / _LETTER - 1.0), ylim=(lines, 0.0))
    axes.axis("off")
    line = 0.0
    for i, ((words, values), (places, rows)) in enumerate(zip(texts, placed, strict=True)):
        if labels is not None:
            axes.text(
                0.0, line + 0.5, verbatim(labels[i]), va="center", fontsize="small", color=INK, weight="bold"
            )
        _draw(axes, words, values, [(margin + x, line + row) for x, row in places], top)
        line += rows + 0.4
    colours = ScalarMappable(Normalize(-top, top), RELEVANCE_COLOURS)
    colours.set_array(amounts.numpy())
    draw_scale(figure, colours, ax=axes, shrink=0.4, aspect=25, pad=0.02)
    draw_title(figure, title)
    return figure


def _checked(
    tokens: Sequence[Sequence[str]], relevance: Sequence[Tensor], most: int
) -> list[tuple[list[str], Tensor]]:
    if len(tokens) == 0:
        raise ValueError("there is nothing to draw: no text was given")
    if any(isinstance(words, str) for words in tokens):
        raise TypeError(
            "tokens are a list of texts, each a list of tokens: give a single text as [tokens], [relevance]"
        )
    if len(tokens) != len(relevance):
        raise ValueError(f"there are {len(tokens)} texts, and relevance of {len(relevance)}")
    texts = []
    for words, amounts in zip(tokens, relevance, strict=True):
        values = finite(amounts, "relevance of the tokens of a text", "[tokens]", 1)
        shown = [_visible(word) for word in require_names(words, len(values), "tokens")]
        before = len(shown) - most
        if before > 0:
            shown = [f"… {before} before (sum)", *shown[before:]]
            values = torch.cat([values[:before].sum(0, keepdim=True), values[before:]])
        texts.append((shown, values))
    return texts


def _visible(word: str) -> str:
    """A token in one line; the blank with which many begin is in the gap between them."""
    word = visible(word.replace("\n", "⏎").replace("\t", "⇥"))
    return word.strip(" ") or "␣"


def _place(words: Sequence[str], room: float) -> tuple[list[tuple[float, int]], int]:
    """Where each word begins, in letters and lines, and how many lines there are."""
    places, x, row = [], 0.0, 0
    for word in words:
        if x > 0.0 and x + len(word) + _GAP > room:
            x, row = 0.0, row + 1
        places.append((x, row))
        x += len(word) + 2 * _GAP
    return places, row + 1


def _draw(
    axes: Axes, words: Sequence[str], values: Tensor, places: Sequence[tuple[float, float]], top: float
) -> None:
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    colours = colours_of(values, top) / 255.0
    boxes = [
        Rectangle((x - 0.4, y + 0.08), len(word) + 0.8, 0.84)
        for word, (x, y) in zip(words, places, strict=True)
    ]
    axes.add_collection(PatchCollection(boxes, facecolor=colours.tolist(), linewidth=0))
    for word, (x, y), colour in zip(words, places, colours.sum(-1).tolist(), strict=True):
        axes.text(
            x + len(word) / 2,
            y + 0.53,
            verbatim(word),
            ha="center",
            va="center",
            family="monospace",
            fontsize=10,
            color="white" if colour < 1.5 else INK,
        )
