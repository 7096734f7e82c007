"""Show what `tdhook demo` or `tdhook explain` wrote as a video: what `tdhook video` does."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.text import Text
from tensordict.utils import NestedKey

from tdhook.cli.folders import made_of, read_output
from tdhook.cli.summaries import Explained, Told
from tdhook.cli.tables import progress_bar
from tdhook.configuration import write_key
from tdhook.markup import visible
from tdhook.video import write_video

__all__ = ["run"]


def run(
    folder: Path, out: Path | None, fps: float, every: int, steps: int | None, key: NestedKey | None
) -> None:
    """Write the video of an output folder, with the names that its summary gives."""
    output = read_output(folder)
    rollout = output.rollout
    if rollout.get("frame", None) is None:
        raise ValueError(
            f"the rollout in {folder} has no frames to be shown: run tdhook explain (or tdhook demo) with --frames"
        )
    explanation = _explanation(output.told, key)
    place = folder / "video.mp4" if out is None else out
    with progress_bar() as progress, made_of(output, place) as new:
        task = progress.add_task("drawing", total=None)
        write_video(
            rollout,
            new,
            fps,
            features=explanation.features,
            actions=explanation.actions,
            key=key,
            every=every,
            steps=steps,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    Console().print(Text(visible(f"wrote {place}")), soft_wrap=True)


def _explanation(told: Told, key: NestedKey | None) -> Explained:
    """The part of the summary that is of a key, with its names; the first where none is asked for."""
    wanted = None if key is None else write_key(key)
    return next((part for part in told.explanations if part.of == wanted), told.explanations[0])
