"""Videos of explained rollouts (extra ``video``: imageio-ffmpeg and Pillow).

Pictures are drawn and encoded a few at a time: a rollout that lies memory-mapped on disk is never held in memory.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor

from tdhook.extras import require
from tdhook.files import replacing
from tdhook.plots.canvas import Canvas
from tdhook.plots.frames import as_pictures
from tdhook.plots.style import largest, require_names, top_of
from tdhook.rl.rollouts import taken_actions

__all__ = ["write_video"]

_AT_ONCE = 16
"""Pictures that are drawn together."""
_KNOWN = 20_000_000
"""About how many values of relevance the scale is taken from."""
_NUMBERS = 6
"""Up to how many numbers of a continuous action are written out."""
_FORMATS = (".mp4", ".gif")
_FASTEST_GIF = 50.0
"""Up to how many pictures per second a gif keeps each of them."""


@dataclass(frozen=True)
class _Film:
    """What is to be seen.

    Attributes:
        frames: ``[time, height, width, 3]`` or what else :func:`tdhook.plots.overlay` takes.
        relevance: ``[time, *shape]``.
        channels: the axis of relevance over which it is summed; ``None`` for none.
        caption: what stands beneath a step.
    """

    frames: Tensor
    relevance: Tensor
    channels: int | None
    caption: Callable[[int], str]

    def amounts(self, steps: slice) -> Tensor:
        """Relevance ``[steps, rows, columns]`` or ``[steps, features]`` of some steps."""
        part = torch.as_tensor(self.relevance[steps]).to(torch.float32)
        if not bool(part.isfinite().all()):
            raise ValueError("relevance has NaN or infinite values, which have no colour")
        return part if self.channels is None else part.sum(self.channels)


def write_video(
    source: TensorDictBase | tuple[Tensor, Tensor],
    path: str | Path,
    fps: float = 30.0,
    *,
    features: Sequence[str] | None = None,
    actions: Sequence[str] = (),
    key: NestedKey | None = None,
    every: int = 1,
    steps: int | None = None,
    scale: float | None = None,
    max_features: int = 16,
    progress: Callable[[int, int], object] | None = None,
) -> Path:
    """Show a rollout and its relevance, as a video or an animated picture.

    Relevance with the shape of an image lies over the frame, beside the frame itself; that of a vector is shown as bars
    beside it. One scale holds for the whole video. Beneath stand the step, the action and the return so far.

    Args:
        source: an explained rollout of batch size ``[time]`` with ``"frame"``, uint8 ``[time, height, width, 3]``, as
            :func:`tdhook.rl.rollouts.explained_rollout` renders with ``frames=True``; or frames and relevance,
            ``[time, rows, columns]`` or ``[time, features]``.
        path: ``.mp4`` (H.264, which browsers play) or ``.gif``. Missing folders are made.
        fps: pictures per second.
        features: one name per feature; by default ``x0`` and so on. Not needed where relevance lies over the frame.
        actions: one name per action; by default ``action 0`` and so on.
        key: the entry of the rollout whose relevance is shown; by default ``"frame"`` where it has relevance, or
            else the only one that has.
        every: only each so-many-th step is shown.
        steps: only so many steps from the beginning are shown.
        scale: relevance at the end of the scale; by default the 99.5th percentile of its size.
        max_features: how many bars there are: those of largest mean absolute relevance; the rest is summed in one more.
        progress: called with the number of pictures written and that of all, from time to time.

    Returns:
        The path.

    Raises:
        ImportError: imageio-ffmpeg or Pillow is not installed.
        KeyError: the rollout has no frames, or no such relevance.
        ValueError: there is no step, or shapes and names do not fit together.
    """
    path = Path(path)
    if path.suffix.lower() not in _FORMATS:
        raise ValueError(f"a video is written to a file that ends in {' or '.join(_FORMATS)}, got {path}")
    if every < 1 or (steps is not None and steps < 1) or not fps > 0:
        raise ValueError(f"every, steps and fps are positive, got every={every}, steps={steps}, fps={fps}")
    _require_ffmpeg()
    film = _film(source, actions, key)
    count = len(film.frames) if steps is None else min(steps, len(film.frames))
    bars = _Bars.of(film, features, max_features) if film.amounts(slice(0, 1)).dim() == 2 else None
    height, width = as_pictures(film.frames[:1]).shape[1:3]
    canvas = Canvas(
        height, width, _top(film, bars) if scale is None else scale, None if bars is None else bars.names
    )
    written, total = 0, len(range(0, count, every))
    with replacing(path) as new, _writer(new, canvas.size, fps, total) as write:
        for first in range(0, count, every * _AT_ONCE):
            chosen = slice(first, min(count, first + every * _AT_ONCE), every)
            amounts = film.amounts(chosen)
            captions = [film.caption(step) for step in range(count)[chosen]]
            shown = amounts if bars is None else bars.of_steps(amounts)
            for picture in canvas.draw(film.frames[chosen], shown, captions):
                write(picture)
                written += 1
            if progress is not None:
                progress(written, total)
    return path


@dataclass(frozen=True)
class _Bars:
    """Which features are shown.

    Attributes:
        shown: their indices.
        names: theirs, and one for all others if there are any.
    """

    shown: list[int]
    names: list[str]

    @classmethod
    def of(cls, film: _Film, features: Sequence[str] | None, most: int) -> _Bars:
        relevance = film.amounts(slice(None))
        count = relevance.shape[1]
        names = (
            [f"x{i}" for i in range(count)]
            if features is None
            else require_names(features, count, "features")
        )
        shown = largest(relevance.abs().mean(0), most)
        rest = [f"{count - most} others (sum)"] if len(shown) < count else []
        return cls(shown, [names[i] for i in shown] + rest)

    def of_steps(self, relevance: Tensor) -> Tensor:
        """``[steps, bars]`` of ``[steps, features]``."""
        shown = relevance[:, self.shown]
        if len(self.names) == len(self.shown):
            return shown
        return torch.cat([shown, relevance.sum(1, keepdim=True) - shown.sum(1, keepdim=True)], dim=1)


def _top(film: _Film, bars: _Bars | None) -> float:
    """The scale, from so many steps as are well kept in memory."""
    every = 1 + film.relevance.numel() // _KNOWN
    amounts = film.amounts(slice(None, None, every))
    return top_of(amounts if bars is None else bars.of_steps(amounts))


def _film(
    source: TensorDictBase | tuple[Tensor, Tensor], actions: Sequence[str], key: NestedKey | None
) -> _Film:
    if isinstance(source, TensorDictBase):
        return _of_rollout(source, actions, key)
    frames, relevance = (torch.as_tensor(part).detach() for part in source)
    if relevance.dim() not in (2, 3):
        raise ValueError(
            "relevance has shape [time, rows, columns] (over the frame) or [time, features] (beside it), "
            f"got {tuple(relevance.shape)}"
        )
    _require_steps(frames, relevance)
    return _Film(frames, relevance, None, lambda step: f"step {step}")


def _of_rollout(rollout: TensorDictBase, actions: Sequence[str], key: NestedKey | None) -> _Film:
    if rollout.batch_dims != 1:
        raise ValueError(
            f"a video shows one rollout, of batch size [time], and this one has {list(rollout.batch_size)}: "
            "choose one, as in rollout[0]"
        )
    frames = rollout.get("frame", None)
    if frames is None:
        raise KeyError(
            "the rollout has no 'frame': make it with tdhook.rl.rollouts.explained_rollout(..., frames=True), or on "
            "the command line with tdhook explain --frames"
        )
    where = _explained_key(rollout, key)
    relevance = rollout.get(("attr", *where))
    _require_steps(frames, relevance)
    caption = _captions(rollout, actions)
    if where == ("frame",):
        if relevance.dim() != 3:
            raise ValueError(
                f"('attr', 'frame') has shape [time, rows, columns], got {tuple(relevance.shape)}"
            )
        return _Film(frames, relevance, None, caption)
    read = rollout.get(where, None)
    if read is not None and read.shape != relevance.shape:
        raise ValueError(
            f"relevance of {where} has shape {tuple(relevance.shape)}, and what it belongs to {tuple(read.shape)}: it "
            "is that of several targets. Give one of them, as (frames, relevance)"
        )
    if relevance.dim() == 4:
        return _Film(frames, relevance, _channels(relevance), caption)
    return _Film(frames, relevance.flatten(1), None, caption)


def _explained_key(rollout: TensorDictBase, key: NestedKey | None) -> tuple[str, ...]:
    """The key without ``"attr"``, as a tuple."""
    attr = rollout.get("attr", None)
    known = [] if attr is None else [_as_tuple(each) for each in attr.keys(True, True)]
    if key is not None:
        asked = _as_tuple(unravel_key(key))
        if asked not in known:
            raise KeyError(f"the rollout has no relevance of {key!r}; it has that of {known or 'nothing'}")
        return asked
    if ("frame",) in known:
        return ("frame",)
    if len(known) != 1:
        raise KeyError(
            f"of which key is relevance to be shown? Give key=...; the rollout has that of {known or 'nothing'}"
        )
    return known[0]


def _as_tuple(key: NestedKey) -> tuple[str, ...]:
    return (key,) if isinstance(key, str) else tuple(key)


def _channels(relevance: Tensor) -> int:
    """Which axis of ``[time, *, *, *]`` has the channels: the first or the last, whichever is the shortest."""
    first, middle, last = relevance.shape[1:]
    if first < min(middle, last):
        return 1
    if last < min(first, middle):
        return 3
    raise ValueError(
        f"relevance has shape {tuple(relevance.shape)}, and it cannot be seen which axis has the channels: write their "
        'sum, [time, rows, columns], under ("attr", "frame")'
    )


def _require_steps(frames: Tensor, relevance: Tensor) -> None:
    if len(frames) != len(relevance):
        raise ValueError(f"there are {len(frames)} frames, and relevance of {len(relevance)} steps")
    if frames.numel() == 0 or relevance.numel() == 0:
        raise ValueError(
            f"there is nothing to show: frames have shape {tuple(frames.shape)}, relevance {tuple(relevance.shape)}"
        )


def _captions(rollout: TensorDictBase, names: Sequence[str]) -> Callable[[int], str]:
    """What to write beneath each step: its number, the action, the return so far."""
    reward, done = rollout.get(("next", "reward"), None), rollout.get(("next", "done"), None)
    totals = None
    if reward is not None and done is not None:
        totals, total = [], 0.0
        over = False
        rewards, ends = reward.reshape(len(rollout), -1).sum(1), done.reshape(len(rollout), -1).any(1)
        for gained, ended in zip(rewards.tolist(), ends.tolist(), strict=True):
            total = gained + (0.0 if over else total)
            totals.append(total)
            over = ended
    taken = _taken(rollout, names)

    def caption(step: int) -> str:
        parts = [f"step {step}"]
        if taken is not None:
            parts.append(taken(step))
        if totals is not None:
            parts.append(f"return {totals[step]:g}")
        return "   ".join(parts)

    return caption


def _taken(rollout: TensorDictBase, names: Sequence[str]) -> Callable[[int], str] | None:
    action = rollout.get("action", None)
    if action is None:
        return None
    action = action.reshape(len(rollout), -1)
    count = len(names) or (action.shape[1] if action.shape[1] > 1 else int(action.max()) + 1)
    taken = taken_actions(rollout, count)
    if taken is not None:
        return lambda step: names[int(taken[step])] if names else f"action {int(taken[step])}"
    if action.shape[1] > _NUMBERS:
        return None
    return lambda step: "action " + " ".join(f"{value:+.2f}" for value in action[step].tolist())


@contextmanager
def _writer(path: Path, size: tuple[int, int], fps: float, count: int) -> Iterator[Callable[[Tensor], None]]:
    """What takes ``count`` pictures, one by one.

    Raises:
        OSError: ffmpeg has not written all of them.
    """
    ffmpeg = _require_ffmpeg()
    options: dict[str, Any] = {
        "codec": "libx264",
        "pix_fmt_out": "yuv420p",
        "quality": 7,
        "output_params": ["-preset", "veryfast"],
    }
    if path.suffix.lower() == ".gif":
        # A palette for each picture: one for all would need all of them at once.
        palettes = "split[a][b];[a]palettegen=stats_mode=single[p];[b][p]paletteuse=new=1:dither=none"
        options = {"codec": "gif", "pix_fmt_out": "pal8", "quality": None}
        options["output_params"] = ["-filter_complex", palettes]
    height, width = size
    encoder = ffmpeg.write_frames(
        str(path), (width, height), fps=fps, macro_block_size=2, ffmpeg_log_level="quiet", **options
    )
    encoder.send(None)  # starts it
    try:
        yield lambda picture: encoder.send(picture.contiguous().numpy())
    except OSError as error:
        raise OSError(f"{path.name} could not be written: ffmpeg stopped. Is the disk full?") from error
    finally:
        encoder.close()
    few = path.suffix.lower() == ".gif" and fps > _FASTEST_GIF
    if not _holds(path, 1 if few else count, ffmpeg.get_ffmpeg_exe()):
        raise OSError(f"{path.name} could not be written: ffmpeg has not finished it. Is the disk full?")


def _holds(path: Path, count: int, ffmpeg: str) -> bool:
    """Whether a video is whole, and has so many pictures: they are counted, not decoded."""
    if not path.is_file() or path.stat().st_size == 0:
        return False
    copied = ("-map", "0:v:0", "-c", "copy", "-f", "null", "-progress", "pipe:1", "-nostats", "-")
    said = subprocess.run(
        [ffmpeg, "-nostdin", "-v", "error", "-i", str(path), *copied], capture_output=True, check=False
    )
    kept = re.findall(rb"^frame=\s*(\d+)", said.stdout, flags=re.MULTILINE)
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        ends = path.suffix.lower() != ".gif" or file.read() == b";"
    return ends and said.returncode == 0 and not said.stderr and bool(kept) and int(kept[-1]) >= count


def _require_ffmpeg() -> Any:
    require("PIL", "tdhook.video")
    return require("imageio_ffmpeg", "tdhook.video")
