"""Frames and maps of relevance as small as they get: images that a browser decodes one by one, maps in 8 bits."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from tdhook.pages.preparation import View

__all__ = ["Pictures", "checked_frames", "frames_of_observation", "pictures_of", "png"]

Encoder: TypeAlias = Callable[[Tensor], bytes]

_CHARACTERS = 12_000_000
"""How many of them all pictures of a page may have."""

_PIXELS = 150_000_000
"""How many of them are encoded at most: some 10 million are a second."""

_WIDEST_FRAME, _WIDEST_MAP = 640, 128
_RICH = 12_000
"""Bytes of a frame from which on it is more of a photograph than of a drawing."""


@dataclass(frozen=True, eq=False)
class Pictures:
    """The pictures of a page.

    Attributes:
        every: of how many steps one has a picture.
        images: for each environment one image per kept step, in base64; ``None`` where there are no frames.
        kind: media type of the images.
        maps: for each view likewise: 8-bit relevance, row by row, deflated, in base64; or ``None``.
        shape: ``(height, width)`` of a map.
        reach: how many times the picture's height and width a map covers: a little more where the last row and column
            of a thinned map stick out.
        tops: for each view the relevance that 127 stands for.
        notes: what was thinned, in sentences.
    """

    every: int
    images: list[list[str]] | None
    kind: str
    maps: list[list[list[str]] | None]
    shape: tuple[int, int]
    reach: tuple[float, float]
    tops: list[float]
    notes: list[str]


def checked_frames(frames: Tensor, batch: Sequence[int], name: str) -> Tensor:
    """Frames as ``[environments, time, height, width, 3]``.

    Args:
        frames: uint8, ``[*batch, time, height, width, 3]``, or with one channel or none.
        batch: ``[environments, time]``.
        name: of the entry, for errors.

    Raises:
        ValueError: they have another shape or type.
    """
    given, steps = list(frames.shape), batch[0] * batch[1]
    if frames.dim() > 2 and frames.shape[-1] not in (1, 3):
        frames = frames[..., None]
    size = frames.shape[-3:].numel()
    if frames.dtype != torch.uint8 or frames.dim() < 4 or size == 0 or frames.numel() != steps * size:
        raise ValueError(
            f"frames are uint8 of shape [*batch, time, height, width, 3]; entry {name!r} is {frames.dtype} of shape "
            f"{given}"
        )
    frames = frames.detach().cpu().reshape(*batch, *frames.shape[-3:])
    return frames.expand(*frames.shape[:-1], 3)


def frames_of_observation(value: Tensor, batch: Sequence[int], channels_first: bool) -> Tensor:
    """Frames that show an observed picture, where nothing was rendered.

    Three channels are colours. Of others the largest value at a pixel is shown, in grey from the least value of the
    rollout to the greatest.

    Args:
        value: ``[*batch, time, channels, height, width]``, or with the channels last.
        batch: ``[environments, time]``.
        channels_first: which of the two.
    """
    value = value.detach().cpu().reshape(*batch, *value.shape[-3:])
    value = value.movedim(2, -1) if channels_first else value
    if value.shape[-1] != 3:
        value = value.amax(-1, keepdim=True)
    if value.dtype != torch.uint8:
        value = value.float().nan_to_num()
        low, high = value.min(), value.max()
        value = ((value - low) * (255 / (high - low).clamp(min=1e-12))).round().to(torch.uint8)
    return value.expand(*value.shape[:-1], 3)


def pictures_of(frames: Tensor | None, views: Sequence[View]) -> Pictures | None:
    """All pictures of a page, thinned in time until they have room; ``None`` where there are none.

    Args:
        frames: ``[environments, time, height, width, 3]``.
        views: of the same environments and steps; their maps, if any, cover the frame.
    """
    mapped = [view.maps for view in views if view.maps is not None]
    first = frames if frames is not None else mapped[0] if mapped else None
    if first is None:
        return None
    environments, time = first.shape[:2]
    notes: list[str] = []
    kind: str = "image/png"
    encode: Encoder = png
    shrink = 1
    if frames is not None:
        shrink = -(-max(frames.shape[2:4]) // _WIDEST_FRAME)
        if shrink > 1:
            notes.append(f"Frames are shown at 1/{shrink} of their size.")
        kind, encode = _encoder([_shrunk(frame, shrink) for frame in _samples(frames)])
    height, width = mapped[0].shape[2:] if mapped else (1, 1)
    pool = -(-max(height, width) // _WIDEST_MAP)
    if pool > 1:
        notes.append(f"Relevance on frames is the mean of {pool}×{pool} pixels.")
    tops = [1.0 if view.maps is None else _top(view.maps, pool) for view in views]

    def image(frame: Tensor) -> str:
        return base64.b64encode(encode(_shrunk(frame, shrink))).decode("ascii")

    def quantised(one: Tensor, top: float) -> str:
        small = (_pooled(one, pool) * (127 / top)).clamp(-127, 127).round().to(torch.int8)
        return base64.b64encode(zlib.compress(small.numpy().tobytes(), 9)).decode("ascii")

    sizes, pixels = [0.0], 1
    if frames is not None:
        sizes.append(_mean(len(image(frame)) for frame in _samples(frames)))
        pixels += frames[0, 0, ..., 0].numel() // shrink**2
    for view, top in zip(views, tops, strict=True):
        if view.maps is not None:
            sizes.append(_mean(len(quantised(one, top)) for one in _samples(view.maps)))
            pixels += height * width // 4
    room = int(min(_CHARACTERS / sum(sizes), _PIXELS / pixels)) // environments
    every = -(-time // max(1, room))
    if every > 1:
        notes.append(f"Of every {every} steps the first has a picture, which stands for all of them.")
    return Pictures(
        every=every,
        images=None if frames is None else [[image(one) for one in each[::every]] for each in frames],
        kind=kind,
        maps=[
            None
            if view.maps is None
            else [[quantised(one, top) for one in each[::every]] for each in view.maps]
            for view, top in zip(views, tops, strict=True)
        ],
        shape=(-(-height // pool), -(-width // pool)),
        reach=(-(-height // pool) * pool / height, -(-width // pool) * pool / width),
        tops=tops,
        notes=notes,
    )


def _mean(sizes: Iterable[int]) -> float:
    listed = list(sizes)
    return sum(listed) / len(listed)


def _samples(each: Tensor) -> list[Tensor]:
    """Some of what is there for each step."""
    flat = each.flatten(0, 1)
    return list(flat[:: 1 + (len(flat) - 1) // 12])


def _shrunk(frame: Tensor, factor: int) -> Tensor:
    if factor == 1:
        return frame
    channels_first = frame.movedim(-1, 0)[None].float()
    small = functional.avg_pool2d(channels_first, factor, ceil_mode=True)
    return small[0].movedim(0, -1).round().to(torch.uint8)


def _pooled(one: Tensor, factor: int) -> Tensor:
    return functional.avg_pool2d(one[None, None], factor, ceil_mode=True)[0, 0] if factor > 1 else one


def _top(maps: Tensor, pool: int) -> float:
    """The relevance from which on colour is full: less than 0.1 % of all is larger."""
    flat = maps.flatten(0, 1)
    some = flat[:: 1 + flat.numel() // 10_000_000]
    size = torch.stack([_pooled(one, pool) for one in some]).abs().flatten()
    top = torch.quantile(size[:: 1 + len(size) // 10_000_000], 0.999, interpolation="higher").item()
    return top or size.max().item() or 1.0


def _encoder(samples: list[Tensor]) -> tuple[str, Encoder]:
    """How frames like these are best written: WebP if pillow is installed, else PNG, which needs nothing."""
    try:
        from PIL import Image, features
    except ImportError:
        return "image/png", png
    if not features.check("webp"):
        return "image/png", png

    def writer(**options: object) -> Encoder:
        def write(frame: Tensor) -> bytes:
            file = io.BytesIO()
            Image.fromarray(frame.numpy()).save(file, "WEBP", **options)
            return file.getvalue()

        return write

    exact = writer(lossless=True, method=1, quality=0)
    rich = _mean(len(exact(frame)) for frame in samples) > _RICH
    return "image/webp", writer(quality=75, method=1) if rich else exact


def png(frame: Tensor) -> bytes:
    """PNG (ISO/IEC 15948) of a frame ``[height, width, 3]``: true colour of 8 bits, no filter."""
    height, width, _ = frame.shape
    rows = torch.zeros(height, 1 + 3 * width, dtype=torch.uint8)
    rows[:, 1:] = frame.reshape(height, -1)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.numpy().tobytes(), 6)), (b"IEND", b""))
    body = b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body
