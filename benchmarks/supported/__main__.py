"""Explain a small model of every type that transformers and torchvision register, and write the page that says how."""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.supported.page import PAGE, RESULTS, page, read
from benchmarks.supported.status import status
from benchmarks.supported.workers import rows


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what is not there yet, and write the page."""
    arguments = parser().parse_args(argv)
    kept = {} if arguments.afresh else {key(row): row for row in read(arguments.json)}
    from benchmarks.supported import libraries  # loads what it measures

    registered = [(library, name) for library, names in libraries.NAMES.items() for name in names()]
    wanted = [each for each in registered if not arguments.words or each[1] in arguments.words]
    about = machine() | {"registered": {library: len(names()) for library, names in libraries.NAMES.items()}}
    again = set(arguments.again or ())
    left = [each for each in wanted if each not in kept or arguments.words or status(kept[each]) in again]
    start = time.perf_counter()
    for number, row in enumerate(rows(left, arguments.seconds), 1):
        kept[key(row)] = row
        told = row.get("reason") or row.get("error") or ""
        spent = time.perf_counter() - start
        print(
            f"{number}/{len(left)} {spent:.0f} s: {row['library']} {row['name']}: {status(row)} {told}",
            flush=True,
        )
        write(arguments.json, about, [kept[each] for each in registered if each in kept])
    if arguments.page:
        PAGE.write_text(page([kept[each] for each in registered if each in kept], about))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.supported", description=__doc__)
    made.add_argument("words", nargs="*", help="only these names, measured anew")
    made.add_argument("--afresh", action="store_true", help="measure all anew")
    made.add_argument("--again", action="append", metavar="STATUS", help="measure what has this status anew")
    made.add_argument("--seconds", type=float, default=60.0, help="that one model may take")
    made.add_argument("--json", type=Path, default=RESULTS, help="where results are read and written")
    made.add_argument("--no-page", dest="page", action="store_false", help="leave the page as it is")
    return made


def key(row: dict[str, Any]) -> tuple[str, str]:
    return row["library"], row["name"]


def machine() -> dict[str, Any]:
    """Versions of what is measured, and with what."""
    libraries = ("transformers", "torchvision", "timm", "tdhook", "torch")
    return {name: version(name) for name in libraries if find_spec(name)} | {
        "python": platform.python_version()
    }


def write(file: Path, about: dict[str, Any], found: list[dict[str, Any]]) -> None:
    """A model in each line; beside, and then in its place, so that what is there is whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(rounded(row)) for row in found)
    beside = file.with_suffix(".part")
    beside.write_text(f'{{"machine": {json.dumps(about)}, "models": [\n{lines}\n]}}\n')
    beside.replace(file)


def rounded(row: dict[str, Any]) -> dict[str, Any]:
    """Two digits are more than the numbers mean."""
    return {key: float(f"{value:.2g}") if isinstance(value, float) else value for key, value in row.items()}


if __name__ == "__main__":
    main()
