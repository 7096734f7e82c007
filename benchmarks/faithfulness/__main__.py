"""Measure how faithful explanations are, print it, save it, and write the page that tells it."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

import torch

from benchmarks.faithfulness import page
from benchmarks.faithfulness.subjects import Subject


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the subjects that are asked for, or those that have no result yet."""
    arguments = _parser().parse_args(argv)
    found = {} if arguments.afresh else {row["name"]: row for row in page.read()}
    if not arguments.page:
        torch.set_num_threads(arguments.threads)
        _measure(arguments, found)
    page.PAGE.write_text(page.page(page.read()))
    print(f"wrote {page.PAGE}")


def _measure(arguments: argparse.Namespace, found: dict[str, dict[str, object]]) -> None:
    from benchmarks.faithfulness.agents import AGENTS
    from benchmarks.faithfulness.measuring import measured
    from benchmarks.faithfulness.methods import methods
    from benchmarks.faithfulness.pretrained import PRETRAINED

    known = {**AGENTS, **PRETRAINED}
    unknown = [name for name in arguments.names if name not in known]
    if unknown:
        sys.exit(f"there is no {', '.join(unknown)}: there are {', '.join(known)}")
    for name in arguments.names or [name for name in known if name not in found]:
        start = time.perf_counter()
        try:
            subject: Subject = known[name]()
        except ImportError as error:
            print(f"{name}: left out, {error}", file=sys.stderr)
            continue
        row: dict[str, object] = measured(subject, arguments.seeds or subject.seeds, arguments.methods)
        row["seconds"] = round(time.perf_counter() - start)
        if arguments.methods and name in found:
            row = page.joined(found[name], row, arguments.methods, [each.label for each in methods(subject)])
        found[name] = row
        page.write(found[name], list(known))
        print(page.text(found[name]), flush=True)


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m benchmarks.faithfulness", description=__doc__)
    made.add_argument("names", nargs="*", help="measure these anew (default: all that have no result yet)")
    made.add_argument("--methods", nargs="+", default=(), help="only these, beside the results of all others")
    made.add_argument("--afresh", action="store_true", help="forget the results that there are")
    made.add_argument("--page", action="store_true", help="measure nothing, write the page of the results")
    made.add_argument("--seeds", type=int, help="of everything that is drawn (default: each subject's own)")
    made.add_argument("--threads", type=int, default=1, help="of torch (default: %(default)s)")
    return made


if __name__ == "__main__":
    main()
