"""Show what `tdhook demo` or `tdhook explain` wrote as a video: what `tdhook video` does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text
from tensordict.utils import NestedKey

from tdhook.cli.folders import read_output
from tdhook.cli.tables import progress_bar
from tdhook.configuration import write_key
from tdhook.video import write_video

__all__ = ["run"]


def run(
    folder: Path, out: Path | None, fps: float, every: int, steps: int | None, key: NestedKey | None
) -> None:
    """Write the video of an output folder, with the names that its summary gives."""
    rollout, summary = read_output(folder)
    if rollout.get("frame", None) is None:
        raise ValueError(
            f"the rollout in {folder} has no frames to be shown: run tdhook explain (or tdhook demo) with --frames"
        )
    explanation = _explanation(summary, key)
    with progress_bar() as progress:
        task = progress.add_task("drawing", total=None)
        path = write_video(
            rollout,
            folder / "video.mp4" if out is None else out,
            fps,
            features=list(explanation["mean_relevance"]),
            actions=list(explanation["action_counts"]),
            key=key,
            every=every,
            steps=steps,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    Console().print(Text(f"wrote {path}"), soft_wrap=True)


def _explanation(summary: Mapping[str, Any], key: NestedKey | None) -> Mapping[str, Any]:
    """The part of the summary that is of a key, with its names; the first where none is asked for."""
    parts: list[Mapping[str, object]] = summary["explanations"]
    wanted = None if key is None else write_key(key)
    return next((part for part in parts if part["of"] == wanted), parts[0])
