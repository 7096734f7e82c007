"""Make a page of what `tdhook demo` or `tdhook explain` wrote: what `tdhook report` does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text
from tensordict import TensorDictBase
from tensordict.utils import NestedKey

from tdhook.cli.folders import made_of, read_output
from tdhook.configuration import write_key
from tdhook.markup import visible
from tdhook.pages.writing import write_report

__all__ = ["run"]


def run(folder: Path, out: Path | None) -> None:
    """Write the page of an output folder, with the names that its summary gives."""
    output = read_output(folder)
    told, rollout = output.told, output.rollout
    explanation = told.explanations[0]
    first, *more = _explained(rollout, explanation.of)
    place = folder / "report.html" if out is None else out
    against = "" if told.baseline is None else f" against {told.baseline}"
    with made_of(output, place) as new:
        write_report(
            rollout,
            new,
            key=first,
            more=more,
            features=_features(explanation.features),
            actions=explanation.actions,
            composite=told.composite if told.method is None else None,
            method=told.method,
            target=told.target,
            account=told.account,
            baseline=told.baseline,
            title=f"{told.environment}: relevance for {told.target} under {told.composite_name}{against}",
            metadata={
                "environment": told.environment,
                "seed": told.seed,
                "composite" if told.method is None else "method": told.composite_name,
                "explained with": f"tdhook {told.tdhook}",
            },
        )
    size = place.stat().st_size / 1e6
    Console().print(Text(visible(f"wrote {place} ({size:.1f} MB)")), soft_wrap=True)


def _features(names: Sequence[str]) -> Sequence[str] | None:
    """Names that were given; numbered entries of a picture are better shown as a picture."""
    return None if all(name == f"x{i}" for i, name in enumerate(names)) else names


def _explained(rollout: TensorDictBase, label: str) -> list[NestedKey]:
    """Where relevance lies; first that of the first explanation, whose label begins with its key."""
    relevance = rollout.get("attr", None)
    if not isinstance(relevance, TensorDictBase):
        raise ValueError("the rollout has no relevance: it has no entry 'attr'")
    parts = [key if isinstance(key, tuple) else (key,) for key in relevance.keys(True, True)]
    # Of values inside the policy there is relevance, and nothing to show beside it.
    keys: list[NestedKey] = [
        ("attr", *part)
        for part in sorted(parts)
        if part != ("frame",) and rollout.get(part, None) is not None and relevance.get(part).numel()
    ]
    if not keys:
        raise ValueError("the rollout has no relevance of anything that the policy read")
    named = label.partition(", ")[0]
    return sorted(keys, key=lambda key: write_key(key[1:] if len(key) > 2 else key[1]) != named)
