"""Sources by their folder: which reader a data set on the disk needs."""

from __future__ import annotations

import os
from pathlib import Path

from tdhook.datasets.lerobot import LeRobot
from tdhook.datasets.minari import Minari
from tdhook.datasets.rows import Rows, Saved

__all__ = ["opened"]


def opened(folder: str | os.PathLike[str]) -> Rows:
    """The rows of a folder: a data set of Minari or LeRobot, a saved TensorDict, or the dump of a replay buffer.

    Raises:
        FileNotFoundError: there is no such folder, or nothing of these in it.
        ImportError: the package that reads it is not installed.
    """
    home = Path(folder)
    if not home.is_dir():
        raise FileNotFoundError(f"there is no folder {home} to take rows from")
    if LeRobot.is_in(home):
        return LeRobot(home)
    return Minari(home) if Minari.is_in(home) else Saved(home)
