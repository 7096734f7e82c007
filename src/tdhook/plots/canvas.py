"""Pictures of a video: the frame, and beside it its relevance, over it or as bars. Drawn by hand, which is fast.

A figure of matplotlib takes a tenth of a second, and a video has thousands of pictures.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from tdhook.markup import visible
from tdhook.plots.frames import as_pictures, coloured, overlay
from tdhook.plots.style import AGAINST, FAINT, FOR, INK

if TYPE_CHECKING:
    import PIL.Image
    import PIL.ImageDraw
    import PIL.ImageFont

_HEIGHT = 320  # a frame is enlarged by a whole number until it is about as high
_NARROWEST = 480  # of a picture, so that caption and legend have room
_MARGIN = 12
_CAPTION = 36
_TEXT = 13
_NAMES, _BARS, _BAR = 190, 240, 16  # widths of names and bars at the most, thickness of a bar
_LEGEND = (110, 10)


class Canvas:
    """Draws the pictures of a video, all of one size, with even numbers of pixels.

    Args:
        height: of the frames.
        width: of the frames.
        top: relevance at the end of the scale.
        features: names of the bars; ``None`` where relevance lies over the frame.
    """

    def __init__(self, height: int, width: int, top: float, features: Sequence[str] | None) -> None:
        self._zoom = max(1, round(_HEIGHT / height))
        self._top = top
        self._features = None if features is None else list(map(visible, features))
        height, width = height * self._zoom, width * self._zoom
        self._left = width + 2 * _MARGIN  # of what is beside the frame
        self._row = 0
        if features is not None:
            longest = max(_pen(_paper(1, 1)).textlength(visible(name), font=_font()) for name in features)
            names = min(_NAMES, int(longest) + 8)
            self._row = max(_BAR + 6, min(60, height // len(features)))
            self._zero = self._left + names + _BARS // 2
            height, width = max(height, self._row * len(features)), names + _BARS
        width = max(_NARROWEST, self._left + width + _MARGIN)
        width += width % 2
        self._above = height + 2 * _MARGIN  # of the caption
        self._above += self._above % 2
        self._body = self._draw_body(width)
        self._foot = self._draw_foot(width)

    def draw(self, frames: Tensor, relevance: Tensor, captions: Sequence[str]) -> Tensor:
        """Pictures ``[n, height, width, 3]`` in uint8.

        Args:
            frames: ``[n, height, width, 3]`` or what else :func:`tdhook.plots.overlay` takes.
            relevance: ``[n, rows, columns]`` over the frame, or ``[n, features]`` as bars.
            captions: what is written beneath each.
        """
        body = self._body.repeat(len(frames), 1, 1, 1)
        shown = as_pictures(frames)
        self._place(body, shown, _MARGIN)
        if self._features is None:
            self._place(body, overlay(shown, relevance, scale=self._top), self._left)
        else:
            self._draw_bars(body, relevance)
        return torch.cat([body, torch.stack([self._write(caption) for caption in captions])], dim=1)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of a picture."""
        return self._above + _CAPTION, self._body.shape[1]

    def _place(self, body: Tensor, frames: Tensor, left: int) -> None:
        large = frames.repeat_interleave(self._zoom, 1).repeat_interleave(self._zoom, 2)
        body[:, _MARGIN : _MARGIN + large.shape[1], left : left + large.shape[2]] = large

    def _draw_bars(self, body: Tensor, relevance: Tensor) -> None:
        room = _BARS // 2 - 4
        lengths = (relevance / self._top * room).round().clamp(-room, room).to(torch.int64)
        pixels = body.numpy()  # the same memory; slices of it cost a fraction of a tensor's
        for picture, row in zip(pixels, lengths.tolist(), strict=True):
            for i, length in enumerate(row):
                above = self._middle(i) - _BAR // 2
                start, end = sorted((self._zero, self._zero + length))
                picture[above : above + _BAR, start:end] = _rgb(FOR if length > 0 else AGAINST)

    def _middle(self, feature: int) -> int:
        """Where the bar of a feature has its middle, from above; all of them are in the middle of the picture."""
        rest = self._above - self._row * len(self._features or ())
        return rest // 2 + int(self._row * (feature + 0.5))

    def _draw_body(self, width: int) -> Tensor:
        """What is the same in all pictures above the caption."""
        paper = _paper(self._above, width)
        pen = _pen(paper)
        for i, name in enumerate(self._features or ()):
            at = (self._zero - _BARS // 2 - 6, self._middle(i))
            pen.text(at, _shortened(pen, name, _NAMES - 8), fill=INK, font=_font(), anchor="rm")
        if self._features is not None:
            first, last = (
                self._middle(0) - self._row // 2,
                self._middle(len(self._features) - 1) + self._row // 2,
            )
            pen.line((self._zero, first, self._zero, last), fill=FAINT)
        return _tensor(paper)

    def _draw_foot(self, width: int) -> PIL.Image.Image:
        """The strip below, with the legend; captions are still to be written."""
        from PIL import Image

        paper = _paper(_CAPTION, width)
        pen, middle, (long, thick) = _pen(paper), _CAPTION // 2 - 4, _LEGEND
        most, least = f"+{self._top:.2g} for", f"against −{self._top:.2g}"
        right = width - _MARGIN
        pen.text((right, middle), most, fill=INK, font=_font(), anchor="rm")
        right -= int(pen.textlength(most, font=_font())) + 6
        if self._features is None:
            colours = coloured(torch.full((long, 1), 255.0), torch.linspace(-1.0, 1.0, long))
        else:  # a bar's length says how much
            ends = torch.tensor([_rgb(AGAINST), _rgb(FOR)], dtype=torch.uint8)
            colours = ends.repeat_interleave(long // 2, 0)
        strip = colours.expand(thick, long, 3).contiguous().numpy()
        paper.paste(Image.fromarray(strip), (right - long, middle - thick // 2))
        pen.text((right - long - 6, middle), least, fill=INK, font=_font(), anchor="rm")
        return paper

    def _write(self, caption: str) -> Tensor:
        paper = self._foot.copy()
        _pen(paper).text((_MARGIN, _CAPTION // 2 - 4), visible(caption), fill=INK, font=_font(), anchor="lm")
        return _tensor(paper)


def _paper(height: int, width: int) -> PIL.Image.Image:
    from PIL import Image

    return Image.new("RGB", (width, height), "white")


def _pen(paper: PIL.Image.Image) -> PIL.ImageDraw.ImageDraw:
    from PIL import ImageDraw

    return ImageDraw.Draw(paper)


def _tensor(paper: PIL.Image.Image) -> Tensor:
    return torch.from_numpy(np.array(paper))


@functools.cache
def _font() -> PIL.ImageFont.FreeTypeFont | PIL.ImageFont.ImageFont:
    """The font of matplotlib where that is installed: Pillow's own knows no Greek and no mathematics."""
    from PIL import ImageFont

    home = find_spec("matplotlib")
    if home is not None and home.origin is not None:
        path = Path(home.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
        if path.exists():
            return ImageFont.truetype(str(path), _TEXT)
    return ImageFont.load_default(_TEXT)


def _shortened(pen: PIL.ImageDraw.ImageDraw, name: str, room: int) -> str:
    if pen.textlength(name, font=_font()) <= room:
        return name
    while name and pen.textlength(f"{name}…", font=_font()) > room:
        name = name[:-1]
    return f"{name}…"


def _rgb(colour: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(colour[1:]))
