"""Relevance on frames: what the agent saw, in grey, and in colour what of it spoke for and against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from tdhook.plots.style import colours_of, draw_scale, draw_title, figure_class, finite, plain, top_of

if TYPE_CHECKING:
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

__all__ = ["overlay", "relevance_on_frames"]

_LUMINANCE = (0.299, 0.587, 0.114)  # of red, green and blue (ITU-R BT.601)
_CONTRAST = 0.4
_FAINTEST = 0.5  # the place in the colours where a trace of relevance begins: a clear red or blue
_OPACITY = 0.7  # power of the share of the scale: below 1, so that small relevance is not lost in the grey


def relevance_on_frames(
    frames: Tensor,
    relevance: Tensor,
    titles: Sequence[str] | None = None,
    title: str | None = None,
    *,
    scale: float | None = None,
    max_frames: int = 12,
    columns: int = 4,
) -> Figure:
    """Frames side by side, each grey and pale, with its relevance over it in red (for) and blue (against).

    All frames have one scale of colours, with zero, which is transparent, in its middle.

    Args:
        frames: ``[n, height, width, 3]`` or what else :func:`overlay` takes.
        relevance: ``[n, rows, columns]``, enlarged to the size of the frames.
        titles: one for each frame; by default, ``frame 0`` and so on.
        title: of the figure.
        scale: relevance of the darkest colour; by default the 99.5th percentile of its size.
        max_frames: how many are shown; of more, as many in even distances.
        columns: how many are shown in a row.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there is no frame, or shapes and titles do not fit together.
    """
    pictures, amounts = as_pictures(frames), _as_maps(relevance)
    _require_fit(pictures, amounts)
    count = len(pictures)
    if titles is not None and len(titles) != count:
        raise ValueError(f"there are {count} frames, and {len(titles)} titles were given")
    top = top_of(amounts) if scale is None else scale
    shown = torch.linspace(0, count - 1, min(count, max_frames)).round().long().tolist()
    columns = min(columns, len(shown))
    rows = -(-len(shown) // columns)
    height, width = pictures.shape[1:3]
    side = 2.6 if columns > 1 else 4.2
    figure: Figure = figure_class()(
        figsize=(max(4.2, side * columns), (side * height / width + 0.35) * rows + 1.0 + 0.3 * bool(title)),
        layout="compressed",
    )
    grid = figure.subplots(rows, columns, squeeze=False)
    drawn = overlay(pictures[shown], amounts[shown], scale=top)
    for i, axes in enumerate(grid.flat):
        axes.set_axis_off()
        if i < len(shown):
            axes.imshow(drawn[i].numpy(), interpolation="nearest")
            plain(axes, f"frame {shown[i]}" if titles is None else titles[shown[i]])
    colours = scale_of(amounts[shown], top)
    draw_scale(figure, colours, ax=grid, shrink=min(1.0, 1.6 / columns), aspect=30, pad=0.03)
    draw_title(figure, title)
    return figure


def overlay(
    frames: Tensor, relevance: Tensor, *, scale: float | None = None, contrast: float = _CONTRAST
) -> Tensor:
    """Frames with their relevance over them, as pictures.

    The frame is made grey and pale. Over it lies the colour of relevance, the more opaque the larger it is: where
    nothing matters, the grey frame is seen.

    Args:
        frames: uint8 or floating point between 0 and 1, boolean too; colour ``[n, height, width, 3]`` or
            ``[n, 3, height, width]``, or grey ``[n, height, width]``, with an axis of one channel or without.
        relevance: ``[n, rows, columns]``, signed. Each value is drawn as a block, if there are fewer than pixels.
        scale: size of relevance that has the darkest colour; by default the 99.5th percentile. Give it where several
            calls are to have the same.
        contrast: of the frame beneath, between 0 (white) and 1 (as dark as it is).

    Returns:
        ``[n, height, width, 3]`` in uint8.

    Raises:
        ValueError: there is nothing to draw, or the shapes do not fit together.
    """
    pictures, amounts = as_pictures(frames), _as_maps(relevance)
    _require_fit(pictures, amounts)
    top = top_of(amounts) if scale is None else scale
    return _blend(pictures, amounts, top, contrast)


def as_pictures(frames: Tensor) -> Tensor:
    """Frames as ``[n, height, width, 3]`` in uint8 on the CPU."""
    frames = torch.as_tensor(frames).detach().cpu()
    shape = tuple(frames.shape)
    if frames.dim() == 4 and shape[-1] not in (1, 3) and shape[1] in (1, 3):
        frames = frames.movedim(1, -1)
    if frames.dim() == 3:
        frames = frames.unsqueeze(-1)
    if frames.dim() != 4 or frames.shape[-1] not in (1, 3):
        raise ValueError(
            f"frames have shape [n, height, width, 3] or, where they are grey, [n, height, width]; got {shape}. "
            "Of stacked frames or other channels, choose one or three to be shown"
        )
    if frames.numel() == 0:
        raise ValueError(f"there is nothing to draw: frames have shape {shape}")
    if frames.dtype == torch.bool:
        frames = frames.to(torch.uint8) * 255
    elif frames.is_floating_point():
        low, high = frames.min().item(), frames.max().item()
        if not (low >= 0.0 and high <= 1.0):  # NaN is caught, too
            raise ValueError(
                f"frames of {frames.dtype} have values from 0 to 1, and these have {low:g} to {high:g}: "
                "rescale them, or give them as torch.uint8"
            )
        frames = (frames * 255.0).round().to(torch.uint8)
    elif frames.dtype != torch.uint8:
        raise ValueError(f"frames are torch.uint8, or floating point from 0 to 1, got {frames.dtype}")
    return frames.expand(*frames.shape[:3], 3)


def _as_maps(relevance: Tensor) -> Tensor:
    return finite(relevance, "relevance on frames", "[n, rows, columns] (summed over channels)", 3)


def _require_fit(pictures: Tensor, amounts: Tensor) -> None:
    if len(pictures) != len(amounts):
        raise ValueError(f"there are {len(pictures)} frames, and relevance of {len(amounts)}")
    if amounts.shape[1] > pictures.shape[1] or amounts.shape[2] > pictures.shape[2]:
        raise ValueError(
            f"relevance is finer than the frames: {tuple(amounts.shape[1:])} on {tuple(pictures.shape[1:3])}; "
            "sum it over blocks, or enlarge the frames"
        )


def _blend(pictures: Tensor, amounts: Tensor, top: float, contrast: float) -> Tensor:
    size = (pictures.shape[1], pictures.shape[2])
    amounts = interpolate(amounts.to(torch.float32).unsqueeze(1), size=size, mode="nearest-exact").squeeze(1)
    grey = (pictures.to(torch.float32) @ torch.tensor(_LUMINANCE)).unsqueeze(-1)
    return coloured(255.0 - contrast * (255.0 - grey), amounts / top)


def coloured(beneath: Tensor, share: Tensor) -> Tensor:
    """Colours over a picture ``[*shape, 1]``; ``share`` of the scale, ``[*shape]``, is in colour and in opacity.

    Small relevance is a little of a full colour, not all of a pale one: that would be seen as light in the frame.
    """
    share = share.clamp(-1.0, 1.0)
    size = share.abs()
    colours = colours_of(share.sign() * (_FAINTEST + (1.0 - _FAINTEST) * size), 1.0)
    return torch.lerp(beneath, colours, size.pow(_OPACITY).unsqueeze(-1)).round().to(torch.uint8)


def scale_of(amounts: Tensor, top: float) -> ScalarMappable:
    """What the colour bar shows: these colours, as they are on white."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    colours = coloured(torch.full((255, 1), 255.0), torch.linspace(-1.0, 1.0, 255))
    scale = ScalarMappable(Normalize(-top, top), ListedColormap(colours.numpy() / 255.0))
    scale.set_array(amounts.flatten().numpy())
    return scale
