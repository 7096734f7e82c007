"""Measure all methods on all subjects by all measures, and write the page that tells it.

What has a result is not measured again: a run that was stopped goes on, and a new method or measure adds to the table.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

import torch

from benchmarks.methods import page


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what has no result yet, and write the page."""
    arguments = _parser().parse_args(argv)
    if not arguments.page:
        torch.set_num_threads(arguments.threads)
        _measure(arguments)
    page.PAGE.write_text(page.page(page.read()))
    print(f"wrote {page.PAGE}")


def _measure(arguments: argparse.Namespace) -> None:
    from benchmarks.faithfulness.agents import AGENTS
    from benchmarks.faithfulness.pretrained import PRETRAINED
    from benchmarks.methods.measuring import measure
    from benchmarks.methods.methods import METHODS

    known = {**AGENTS, **PRETRAINED}
    for given, there in ((arguments.names, known), (arguments.methods, METHODS)):
        unknown = [name for name in given if name not in there]
        if unknown:
            sys.exit(f"there is no {', '.join(unknown)}: there are {', '.join(there)}")
    found = {row["name"]: row for row in page.read()}
    for name in arguments.names or known:
        start = time.perf_counter()
        try:
            subject = known[name]()
        except ImportError as error:
            print(f"{name}: left out, {error}", file=sys.stderr)
            continue
        row = {} if arguments.afresh else found.get(name, {})
        for method in arguments.again:
            row.get("methods", {}).pop(method, None)
            row.pop("agreement", None)
        measure(
            subject, row, arguments.seeds or subject.seeds, arguments.methods or list(METHODS), page.write
        )
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m benchmarks.methods", description=__doc__)
    made.add_argument("names", nargs="*", help="of the subjects (default: all)")
    made.add_argument("--methods", nargs="+", default=(), help="only these (default: all)")
    made.add_argument("--again", nargs="+", default=(), help="forget the results of these methods")
    made.add_argument("--afresh", action="store_true", help="forget all results of the subjects")
    made.add_argument("--page", action="store_true", help="measure nothing, write the page of the results")
    made.add_argument("--seeds", type=int, help="of everything that is drawn (default: each subject's own)")
    made.add_argument("--threads", type=int, default=1, help="of torch (default: %(default)s)")
    return made


if __name__ == "__main__":
    main()
