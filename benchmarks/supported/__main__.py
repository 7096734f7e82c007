"""Explain a small model of every type that transformers and torchvision register, and write the page that says how."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.supported.page import PAGE, RESULTS, page
from benchmarks.supported.status import status
from benchmarks.supported.workers import rows


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what is not there yet, and write the page."""
    arguments = parser().parse_args(argv)
    kept = {} if arguments.afresh else {key(row): row for row in read(arguments.json)}
    from benchmarks.supported import libraries  # loads what it measures

    registered = [(library, name) for library, names in libraries.NAMES.items() for name in names()]
    wanted = [each for each in registered if not arguments.words or each[1] in arguments.words]
    again = set(arguments.again or ())
    left = [each for each in wanted if each not in kept or arguments.words or status(kept[each]) in again]
    start = time.perf_counter()
    for number, row in enumerate(rows(left, arguments.seconds), 1):
        kept[key(row)] = row
        told = row.get("reason") or row.get("error") or ""
        spent = time.perf_counter() - start
        print(f"{number}/{len(left)} {spent:.0f} s: {row['library']} {row['name']}: {status(row)} {told}", flush=True)
        write(arguments.json, [kept[each] for each in registered if each in kept])
    if arguments.page:
        PAGE.write_text(page([kept[each] for each in registered if each in kept]))


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


def read(file: Path) -> list[dict[str, Any]]:
    """The rows that there are."""
    found: list[dict[str, Any]] = json.loads(file.read_text()) if file.exists() else []
    return found


def write(file: Path, found: list[dict[str, Any]]) -> None:
    """One row a line; beside, then in its place."""
    beside = file.with_suffix(".part")
    beside.write_text("[\n" + ",\n".join(json.dumps(row) for row in found) + "\n]\n")
    beside.replace(file)


if __name__ == "__main__":
    sys.exit(main())
