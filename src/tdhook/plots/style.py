"""What all pictures share: colours, the scale of relevance, figures without pyplot, plain axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tdhook.extras import require
from tdhook.markup import visible

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

RELEVANCE_COLOURS = "RdBu_r"
"""Red for relevance that speaks for the target, blue for relevance that speaks against it, white for none."""

# Told apart in any kind of colour vision, and none of them the red or blue of relevance.
ACTION_COLOURS = ("#009e73", "#e69f00", "#7a4f9a", "#56b4e9", "#8c8c00", "#cc79a7", "#5b5b5b", "#8b5a2b")
INK, FAINT = "#333333", "#cccccc"
FOR, AGAINST = "#b2182b", "#2166ac"
LEGEND = "against ← relevance → for"

# The eleven colours between which ColorBrewer's RdBu runs, from blue to red; a video needs no matplotlib for them.
_ANCHORS = (
    (0x05, 0x30, 0x61),
    (0x21, 0x66, 0xAC),
    (0x43, 0x93, 0xC3),
    (0x92, 0xC5, 0xDE),
    (0xD1, 0xE5, 0xF0),
    (0xF7, 0xF7, 0xF7),
    (0xFD, 0xDB, 0xC7),
    (0xF4, 0xA5, 0x82),
    (0xD6, 0x60, 0x4D),
    (0xB2, 0x18, 0x2B),
    (0x67, 0x00, 0x1F),
)
_QUANTILE = 0.995
_ENOUGH = 10_000_000  # values from which a quantile is well known; torch.quantile takes 16 million at most


def figure_class() -> Any:
    """:class:`matplotlib.figure.Figure`, which needs no pyplot.

    Raises:
        ImportError: matplotlib is not installed.
    """
    return require("matplotlib.figure", "tdhook.plots").Figure


def verbatim(text: str) -> str:
    """A text of a user's as matplotlib shows it letter by letter: no dollar begins a formula."""
    return visible(text).replace("$", r"\$")


def draw_legend(axes: Axes, handles: Sequence[Artist], names: Sequence[str], **place: Any) -> None:
    """A legend in which each name is shown, whatever it begins with; ``place`` is as in matplotlib's ``legend``."""
    legend = axes.legend(
        handles=handles, labels=["name"] * len(handles), frameon=False, fontsize="small", **place
    )
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_text(verbatim(name))


def top_of(relevance: Tensor) -> float:
    """Where the scale of relevance ends: the 99.5th percentile of its size, so that no outlier hides the rest.

    Where nearly all is zero it is the largest size, and 1 where all is.
    """
    size = relevance.detach().flatten()
    size = size[:: 1 + len(size) // _ENOUGH].to("cpu", torch.float64).abs()
    top = torch.quantile(size, _QUANTILE, interpolation="higher").item()
    return top or relevance.detach().abs().max().item() or 1.0


def colours_of(relevance: Tensor, top: float) -> Tensor:
    """Colours ``[*shape, 3]``, 0 to 255 in float32, of relevance ``[*shape]``; those of ``RELEVANCE_COLOURS``."""
    anchors = torch.tensor(_ANCHORS, dtype=torch.float32)
    place = (relevance.to(torch.float32) / top).clamp(-1.0, 1.0).add(1.0) * ((len(anchors) - 1) / 2)
    below = place.floor().clamp(max=len(anchors) - 2).long()
    return torch.lerp(anchors[below], anchors[below + 1], (place - below).unsqueeze(-1))


def finite(relevance: Tensor, what: str, shape: str, dims: int) -> Tensor:
    """Relevance as float64 on the CPU, if it can be drawn.

    Args:
        relevance: what is to be drawn.
        what: to call it in messages.
        shape: which it should have, in words.
        dims: how many axes that are.

    Raises:
        ValueError: it has another number of axes, nothing in it, or values that are not finite.
    """
    relevance = torch.as_tensor(relevance).detach().cpu()
    if relevance.dim() != dims:
        raise ValueError(f"{what} has shape {shape}, got {tuple(relevance.shape)}")
    if relevance.numel() == 0:
        raise ValueError(f"there is nothing to draw: relevance has shape {tuple(relevance.shape)}")
    if not bool(relevance.isfinite().all()):
        raise ValueError("relevance has NaN or infinite values, which have no colour")
    return relevance.to(torch.float64)


def require_names(names: Sequence[str], count: int, what: str) -> list[str]:
    """The names, if there is one for each.

    Raises:
        ValueError: there are more or fewer.
    """
    if len(names) != count:
        raise ValueError(f"relevance has {count} {what}, and {len(names)} names were given")
    return list(names)


def largest(sizes: Tensor, most: int) -> list[int]:
    """Indices of the ``most`` largest of ``sizes [n]``, in their own order."""
    if len(sizes) <= most:
        return list(range(len(sizes)))
    return sorted(sizes.topk(most).indices.tolist())


def draw_scale(figure: Figure, image: ScalarMappable, **place: Any) -> None:
    """The colour bar; ``place`` is ``ax`` or ``cax`` of matplotlib's ``colorbar``, and how it lies there."""
    bar = figure.colorbar(image, **{"orientation": "horizontal", "extend": _beyond(image), **place})
    bar.set_label(LEGEND, fontsize="small", color=INK)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize="x-small", length=2, colors=INK)
    low, high = image.get_clim()
    bar.set_ticks([low, 0.0, high], labels=[f"−{-low:.2g}", "0", f"{high:.2g}"])


def _beyond(image: ScalarMappable) -> str:
    """On which side of the scale there are values that it does not reach."""
    low, high = image.get_clim()
    values: Any = image.get_array()
    below, above = bool(values.min() < low), bool(values.max() > high)
    return "both" if below and above else "min" if below else "max" if above else "neither"


def draw_title(figure: Figure, title: str | None) -> None:
    """The title of a figure, on the left."""
    if title:
        figure.suptitle(verbatim(title), x=0.01, horizontalalignment="left", fontsize="large", color=INK)


def colour_of(index: int) -> str:
    """Colour of an action, an agent or a line."""
    return ACTION_COLOURS[index % len(ACTION_COLOURS)]


def plain(axes: Axes, title: str = "") -> None:
    """No frame, small ticks, the title on the left."""
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=2, labelsize="small", colors=INK)
    axes.set_title(verbatim(title), loc="left", fontsize="medium", color=INK)
