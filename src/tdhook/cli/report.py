"""Make a page of what `tdhook demo` or `tdhook explain` wrote: what `tdhook report` does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text
from tensordict import TensorDictBase
from tensordict.utils import NestedKey

from tdhook.cli.folders import read_output
from tdhook.composites import Composite
from tdhook.configuration import write_key
from tdhook.pages.writing import write_report
from tdhook.rl.rollouts import Conservation

__all__ = ["run"]


def run(folder: Path, out: Path | None) -> None:
    """Write the page of an output folder, with the names that its summary gives."""
    rollout, summary = read_output(folder)
    try:
        said = _said(summary)
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(
            f"{folder / 'summary.json'} is not as tdhook writes it: {type(error).__name__}: {error}"
        ) from error
    first, *more = _explained(rollout, summary["explanations"][0]["of"])
    path = write_report(rollout, folder / "report.html" if out is None else out, key=first, more=more, **said)
    Console().print(Text(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)"), soft_wrap=True)


def _said(summary: Mapping[str, Any]) -> dict[str, Any]:
    explanation = summary["explanations"][0]
    environment, composite, account = summary["environment"], summary["composite"], summary["conservation"]
    metadata = {"environment": environment, "seed": summary["seed"], "composite": composite["name"]}
    return {
        "features": _features(list(explanation["mean_relevance"])),
        "actions": list(explanation["action_counts"]),
        "composite": Composite.from_dict({"pairs": composite["pairs"]}),
        "target": summary["target"],
        "account": None if account is None else Conservation(**account),
        "title": f"{environment}: relevance for {summary['target']} under {composite['name']}",
        "metadata": {**metadata, "explained with": f"tdhook {summary['tdhook']}"},
    }


def _features(names: Sequence[str]) -> Sequence[str] | None:
    """Names that were given; numbered entries of a picture are better shown as a picture."""
    return None if all(name == f"x{i}" for i, name in enumerate(names)) else names


def _explained(rollout: TensorDictBase, label: str) -> list[NestedKey]:
    """Where relevance lies; first that of the first explanation, whose label begins with its key."""
    parts = [key if isinstance(key, tuple) else (key,) for key in rollout["attr"].keys(True, True)]
    keys: list[NestedKey] = [("attr", *part) for part in sorted(parts) if part != ("frame",)]
    if not keys:
        raise ValueError("the rollout has no relevance of anything that the policy read")
    named = label.partition(", ")[0]
    return sorted(keys, key=lambda key: write_key(key[1:] if len(key) > 2 else key[1]) != named)
