"""Make a page of a whole data set: what `tdhook dataset report` does."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.text import Text

from tdhook.cli.jobs import finished, names_in, source_of, told_words
from tdhook.datasets.reducers import Reservoir
from tdhook.datasets.result import Result
from tdhook.datasets.spray import SpRAy, Strategies
from tdhook.markup import visible
from tdhook.pages.dataset import write_dataset_report

__all__ = ["run"]

_PARTS = 12
"""How many blocks the shorter side of a picture has, where clusters compare pictures."""


def run(
    folder: Path,
    out: Path | None,
    source: Path | None,
    pooled: int | None,
    clusters: int | None,
    title: str | None,
) -> None:
    """Write the page of a job's folder, with the names that were known when it was begun."""
    result, told = finished(folder), told_words(folder)
    place = folder / "report.html" if out is None else out
    rows = source_of(folder, source)
    if rows is None:
        _say(
            "note: the rows of the source are not where they were, so that their frames are not shown: give --source"
        )
    explained, against = told.get("explained"), told.get("against")
    rules = "method" if told.get("method") else "composite"
    how = f"relevance for {explained} under {told.get(rules)}" if explained else "explained rows"
    named = f"{told.get('environment') or folder.name}: {how}" + (f" against {against}" if against else "")
    words = (
        "environment",
        "policy",
        "source",
        "rows",
        "prepare",
        "explained",
        rules,
        "against",
    )
    write_dataset_report(
        result,
        place,
        source=rows,
        strategies=_strategies(result, pooled, clusters),
        features=names_in(told, "features"),
        actions=names_in(told, "actions"),
        title=named if title is None else title,
        facts={name: told[name] for name in words if told.get(name)},
    )
    _say(f"wrote {place} ({place.stat().st_size / 1e6:.1f} MB)")


def _strategies(result: Result, pooled: int | None, clusters: int | None) -> dict[str, dict[int, Strategies]]:
    """The strategies of each sample, if scikit-learn is installed."""
    found = {}
    for name, reducer in result.reducers.items():
        if not isinstance(reducer, Reservoir):
            continue
        drawn = result.reduced[name]
        shape = drawn["relevance"].shape[1:]
        side = pooled or (max(1, min(shape[-2:]) // _PARTS) if len(shape) > 2 else None)
        try:
            spray = SpRAy(pooled=side, clusters=clusters)
        except ImportError as error:
            _say(f"note: no strategies are shown: {error}")
            return {}
        found[name] = spray.by_group(drawn)
    return found


def _say(text: str) -> None:
    Console().print(Text(visible(text)), soft_wrap=True)
