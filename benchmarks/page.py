"""The documentation's page of benchmarks, made of the committed reports: ``python -m benchmarks.page`` writes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.tables import markdown, report_tables

__all__ = ["page"]

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "fast-and-large" / "what-an-explanation-costs.md"

INTRODUCTION = """\
# What an explanation costs

The floor is *gradient × input* of the same model: one forward pass and one backward pass to the inputs alone, with a
TensorDict in and out. Everything is timed in one process, in turns whose order changes; a ratio is the median over
rounds, with quartiles in parentheses. Each compiled explanation is measured against the *compiled* floor. Aims are what
this library sets itself; where one is missed, the table says so.

This page is made by `python -m benchmarks.page` of the reports in `benchmarks/results`. To measure:

```bash
nox -s bench                                        # all of it, without other libraries
nox -s bench_peers -- --json report.json            # with zennit, tdhook 0.3, autoLRP, captum and LXT
nox -s bench -- Nature --only table --seconds 10    # the cases that have "Nature" in their name
```

`python -m benchmarks --help` lists the options. What each library does is in `benchmarks/peers`, and why one cannot run
a case is in the report. Where there is a GPU, the same cases run on it, at batch sizes that keep it busy.

Nothing else may run meanwhile: threads wait for each other by spinning, and where another program has one of their
cores, two can be several times slower than one. Lines that this has spoilt are marked.
"""


def page(results: Path = RESULTS) -> str:
    """The page that belongs to the reports in a folder."""
    parts = [INTRODUCTION]
    for file in sorted(results.glob("*.json")):
        for report in json.loads(file.read_text()):
            parts.append(
                f"## {heading(report['machine'])}\n\n{circumstances(report['machine'], file.name)}\n"
            )
            parts += [markdown(table) for table in report_tables(report)]
    return "\n".join(parts)


def heading(machine: dict[str, Any]) -> str:
    """The name of what was measured on."""
    return machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"


def circumstances(machine: dict[str, Any], file: str) -> str:
    """Versions, the date, and how busy the machine was."""
    busy = machine.get("load_average")
    load = f" The load average before was {busy[0]:.1f} on {machine['cores']} cores." if busy else ""
    return (
        f"Measured on {machine['date']} with tdhook {machine['tdhook']}, torch {machine['torch']} and Python "
        f"{machine['python']}.{load} From `{file}`."
    )


if __name__ == "__main__":
    PAGE.write_text(page())
