"""One subject measured, cell by cell: what is there already is not measured again."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tensordict import TensorDictBase

from benchmarks.faithfulness.measuring import cost
from benchmarks.faithfulness.methods import FLOOR
from benchmarks.faithfulness.methods import Method as Timed
from benchmarks.faithfulness.subjects import Subject
from benchmarks.methods.measures import AT_ONCE, MEASURES, Case
from benchmarks.methods.methods import METHODS
from tdhook.contexts.attribution import Attribution
from tdhook.evaluation import agreement, explained_by
from tdhook.perturbing.features import Features

__all__ = ["measure"]

Row = dict[str, Any]


def measure(subject: Subject, row: Row, seeds: int, names: Sequence[str], keep: Callable[[Row], None]) -> Row:
    """Add to a subject's results what they lack.

    Args:
        subject: what is explained.
        row: its results so far, empty at first; changed.
        seeds: how often inputs are drawn.
        names: of the methods.
        keep: is given the results whenever there are more.

    Returns:
        The results.
    """
    row.update(name=subject.name, what=subject.what, kind=subject.kind)
    cells = row.setdefault("methods", {})
    tried = {name: METHODS[name].make(subject) for name in names}
    for seed in range(seeds):
        td = subject.draw(seed)
        row.update(rows=len(td), features=Features.of(td, list(subject.keys), subject.groups).count)
        for name, method in tried.items():
            cell = cells.setdefault(name, {"seeds": []})
            if method is None or "failed" in cell:
                continue
            of_seed: Row = cell["seeds"][seed] if seed < len(cell["seeds"]) else {}
            missing = [each for each in MEASURES if each not in of_seed]
            if not missing:
                continue
            of_seed.update(_figures(subject, name, method, td, seed, missing, cell))
            if "failed" not in cell:
                cell["seeds"][seed:] = [of_seed, *cell["seeds"][seed + 1 :]]
            keep(row)
    worked = {name: method for name, method in tried.items() if method is not None and cells[name]["seeds"]}
    _add_costs(subject, worked, cells)
    everyone = [name for name in METHODS if cells.get(name, {}).get("seeds")]
    if row.get("agreement", {}).get("methods") != everyone and len(everyone) > 1:
        made = {name: METHODS[name].make(subject) for name in everyone}
        row["agreement"] = _agreement(
            subject, {name: each for name, each in made.items() if each is not None}
        )
    keep(row)
    return row


def _figures(
    subject: Subject,
    name: str,
    method: Attribution,
    td: TensorDictBase,
    seed: int,
    measures: Sequence[str],
    cell: Row,
) -> dict[str, float | None]:
    """Means over the inputs, by measure; what stops a method is noted in its cell."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            explained = _explained(subject, {name: method}, td, seed)[name]
            case = Case(subject, method, METHODS[name].multiplied, explained, seed)
            found = {each: MEASURES[each].figure(case) for each in measures}
    except Exception as error:  # what one method cannot do must not end a run of hours
        print(f"{subject.name}, {name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        cell["failed"] = f"{type(error).__name__}: {error}"
        return {}
    means = {each: None if value is None else value.mean().item() for each, value in found.items()}
    return {each: None if mean is None or not math.isfinite(mean) else mean for each, mean in means.items()}


def _explained(
    subject: Subject, methods: dict[str, Attribution], td: TensorDictBase, seed: int
) -> dict[str, TensorDictBase]:
    return explained_by(
        methods,
        subject.model,
        td,
        target=subject.target,
        keys=list(subject.keys),
        chunk_size=AT_ONCE,
        seed=seed,
    )


def _add_costs(subject: Subject, methods: dict[str, Attribution], cells: Row) -> None:
    """What each method takes, in gradients, where that is not known: all in turns, with the unit among them."""
    wanted = {name: method for name, method in methods.items() if "cost" not in cells[name]}
    if not wanted:
        return
    floor = METHODS[FLOOR].make(subject)
    assert floor is not None
    td, timed = subject.draw(0), []
    for name, method in {FLOOR: floor, **wanted}.items():
        explained = method.wrap(subject.model)
        # "lrp": as those that have something to make ready, which is not timed.
        timed.append(Timed(name, None, lambda td, _, explained=explained: explained(td.clone()), "lrp"))
    for method, found in zip(timed, cost(timed, td), strict=True):
        cells.setdefault(method.name, {"seeds": []}).setdefault("cost", found)


def _agreement(subject: Subject, methods: dict[str, Attribution]) -> Row:
    """Kendall's rank correlation of each two methods, on the inputs of the first seed."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        explained = _explained(subject, methods, subject.draw(0), 0)
    found = agreement(explained, keys=list(subject.keys), groups=subject.groups)
    return {"methods": list(found.methods), "kendall": found.mean("kendall").tolist()}
