"""What `tdhook demo` and `tdhook explain` wrote, read again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensordict import TensorDict

__all__ = ["read_output"]


def read_output(folder: Path) -> tuple[TensorDict, Mapping[str, Any]]:
    """The explained rollout and the summary of an output folder.

    Raises:
        FileNotFoundError: it is no such folder.
        ValueError: what is in it cannot be read.
    """
    path = folder / "summary.json"
    if not path.is_file() or not (folder / "rollout").is_dir():
        raise FileNotFoundError(
            f"{folder} is no output folder of tdhook: give the one that tdhook demo or tdhook explain wrote, with its "
            "summary.json and rollout"
        )
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        return TensorDict.load_memmap(folder / "rollout"), summary
    except (ValueError, OSError, RuntimeError) as error:
        raise ValueError(f"{folder} cannot be read: {error}") from error
