"""The documentation's page of supported models, made of the committed results."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.supported.reasons import REASONS
from benchmarks.supported.status import CONDITION, ENOUGH, STATUSES, status

__all__ = ["PAGE", "RESULTS", "page", "read"]

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "supported" / "models.json"
PAGE = ROOT / "docs" / "explain" / "supported.md"
MEANING = {
    "ok": "all three are small",
    "gap": "relevance is lost or made: the ledger does not balance",
    "flows": "the two flows find different relevance",
    "float32": "single precision is less exact than the model allows",
    "error": "the explanation raises",
    "not built": "there is no small model to explain, and why",
}

INTRODUCTION = """\
# Supported

Every model type that transformers registers, and every builder of torchvision, is made small, given random weights, and
explained under `attn_lrp`: of its first output that is made of numbers, the largest value that depends on what it reads
(the edge of a box that was cut to its image does not). The models are the libraries' own, unmodified; what
`torch.compile` made inside them runs as Python, within `torch.compiler.set_stance("force_eager")`. A model is *ok* if
three things are small:

- *gap*: what the [ledger](the-ledger.md) misses, as a part of its largest account (the target, what arrives at the
  inputs, or what is absorbed on the way), at most {gap:g};
- *flows*: how far the relevance of the two flows is apart, as a part of its norm, at most {flows:g};
- *float32*: how far single precision is from double precision, likewise, in the worse flow, at most {float32:g}, or
  {condition} times the *conditioning*.

*Conditioning* is the model's own share in that: how far relevance in double precision moves where each weight and input
moves up or down, by lot, by the 6e-08 of its value that single precision may round it by. Where that does not tell, up
to four lots are drawn, and then it is what single precision does to plain gradient times input, which no rule has a
part in: a unit that is nearly zero is on in one precision and off in the other. Nothing that computes in single
precision is closer than about that, and it rounds after every operation, not once. So a model whose error is above
{float32:g}, but no more than {condition} times its conditioning, is ok: not because its relevance is exact, but because
the model, at these random weights, has none that is. How many these are stands below.

Weights are where the library begins, moved by lot; batch norms have the statistics of what they see. No more is done
for them to be tame: what saturates, cancels or overflows at such weights is shown as it is. Where relevance is more
than single precision holds, *float32* is not finite, and what is raised there is told. Where the flows differ,
something that depends on the inputs is [exactly zero](limits.md#what-single-precision-and-torch-leave), and the row
says what.

Each is that of the worst batch element. What a model computes in single precision whatever its weights are in, it
computes in double precision here, so that there is something to compare with.

This page is made of `benchmarks/results/supported/models.json` by a session that goes on where it was interrupted. A
row stays until it is measured anew, so not all are of one state of the library; a time that ran out is that of a
machine which did other things.

```bash
nox -s supported                        # measure what has no result yet, and write this page
nox -s supported -- --afresh            # measure everything
nox -s supported -- --again error       # measure anew what has this status
nox -s supported -- bert swin           # measure these anew
```
"""


def read(file: Path = RESULTS) -> list[dict[str, Any]]:
    """The rows that there are."""
    found: list[dict[str, Any]] = json.loads(file.read_text())["models"] if file.exists() else []
    return found


def page(rows: list[dict[str, Any]], machine: dict[str, Any]) -> str:
    """The page that belongs to results, in the order of libraries and names."""
    return "\n".join(
        [INTRODUCTION.format(**ENOUGH, condition=CONDITION), *_summary(rows, machine), *_tables(rows)]
    )


def _summary(rows: list[dict[str, Any]], machine: dict[str, Any]) -> Iterator[str]:
    libraries = list(dict.fromkeys(row["library"] for row in rows))
    counts = {
        library: Counter(status(row) for row in rows if row["library"] == library) for library in libraries
    }
    yield "## In numbers\n"
    yield (
        "| | " + " | ".join(f"{library} {machine.get(library, '')}".strip() for library in libraries) + " | |"
    )
    yield "|---" * (len(libraries) + 2) + "|"
    for name in STATUSES:
        yield (
            f"| {name} | "
            + " | ".join(str(counts[each][name]) for each in libraries)
            + f" | {MEANING[name]} |"
        )
    yield f"| all | {' | '.join(str(counts[each].total()) for each in libraries)} | |"
    registered = machine.get("registered", {})
    known = " | ".join(str(registered.get(each, "")) for each in libraries)
    yield f"| registered | {known} | those that are not listed are not measured yet |"
    built = {each: counts[each].total() - counts[each]["not built"] for each in libraries}
    shares = [f"{100 * counts[each]['ok'] / max(built[each], 1):.1f} %" for each in libraries]
    yield f"| ok, of those built | {' | '.join(shares)} | |"
    reached = [
        sum(
            row["library"] == each and status(row) == "ok" and row["float32"] <= ENOUGH["float32"]
            for row in rows
        )
        for each in libraries
    ]
    shares = [f"{100 * n / max(built[each], 1):.1f} %" for n, each in zip(reached, libraries, strict=True)]
    yield f"| ok, and float32 at most {ENOUGH['float32']:g} | {' | '.join(shares)} | |"
    hours = sum(row.get("seconds", 0) for row in rows) / 3600
    yield (
        f"\nMeasured with tdhook {machine['tdhook']}, torch {machine['torch']} and Python {machine['python']}, in"
        f" {hours:.1f} hours by one process at a time, of one thread.\n"
    )


def _tables(rows: list[dict[str, Any]]) -> Iterator[str]:
    for library in dict.fromkeys(row["library"] for row in rows):
        yield f"## {library}\n"
        yield "| name | model | relevance of | status | gap | flows | float32 | conditioning | |"
        yield "|---|---|---|---|---|---|---|---|---|"
        for row in rows:
            if row["library"] == library:
                yield _line(row)
        yield ""


def _line(row: dict[str, Any]) -> str:
    reads = ", ".join(f"`{name}`" for name in row.get("relevant", ()))
    numbers = [_number(row.get(name)) for name in (*ENOUGH, "conditioning")]
    cells = [f"`{row['name']}`", row.get("model", ""), reads, status(row), *numbers, _said(row)]
    return f"| {' | '.join(cells)} |"


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0e}".replace("e-0", "e-") if math.isfinite(value) else "not finite"


def _said(row: dict[str, Any]) -> str:
    """Why there are no numbers, or what is wrong with them, or which operations have no rule of their own."""
    said = row.get("reason") or row.get("error") or row.get("raised") or ""
    text = re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", " ".join(said.split())[:160])
    if "raised" in row:
        text = f"in single precision, where relevance reaches {row['largest']:.0e}: {text}"
    reason = REASONS.get(row["name"], "") if status(row) not in ("ok", "not built") else ""
    unknown = ", ".join(f"`{name}`" for name in row.get("unknown", ()))
    if not text and unknown:
        text = f"no rule of its own: {unknown}"
    return "; ".join(filter(None, (reason, text)))
