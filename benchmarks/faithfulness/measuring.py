"""One subject measured: the areas of each method under each baseline of the metric, and what it costs."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Collection
from typing import Any

import torch
from tensordict import TensorDictBase

from benchmarks.faithfulness.methods import FLOOR, Maps, Method, methods
from benchmarks.faithfulness.subjects import Subject
from tdhook.evaluation import perturbation_curve
from tdhook.perturbing.features import Features

__all__ = ["measured"]

Row = dict[str, Any]
DRAWS = 2
"""How often the values are drawn that features are replaced by."""
ROUNDS, SLOW = 3, 0.3
"""How often each method is timed, and from how many seconds on only once."""


def measured(subject: Subject, seeds: int, names: Collection[str] = ()) -> Row:
    """What the tables tell of a subject.

    Args:
        subject: what is explained.
        seeds: how often its inputs are drawn.
        names: methods to measure, and what their cost is told in; all where there are none.
    """
    tried = [each for each in methods(subject) if not names or each.name in (*names, FLOOR)]
    areas: list[dict[str, list[float]]] = [{name: [] for name in subject.metrics} for _ in tried]
    first, features, rows = None, 0, 0
    for seed in range(seeds):
        td = subject.draw(seed)
        first = td if first is None else first
        features, rows = Features.of(td, list(subject.keys), subject.groups).count, len(td)
        for method, found in zip(tried, areas, strict=True):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                maps = method.explain(td, seed)
            for name in subject.metrics:
                found[name].append(area(subject, td, maps, name, seed))
    assert first is not None
    costs = cost(tried, first)
    return {
        "name": subject.name,
        "what": subject.what,
        "kind": subject.kind,
        "features": features,
        "rows": rows,
        "seeds": seeds,
        "methods": [
            {
                "method": method.name,
                "baseline": method.baseline,
                "label": method.label,
                "family": method.family,
                "cost": costs[i],
                "area": found,
            }
            for i, (method, found) in enumerate(zip(tried, areas, strict=True))
        ],
    }


def area(subject: Subject, td: TensorDictBase, maps: Maps, name: str, seed: int) -> float:
    """The area between the curves of an explanation, features replaced by one of the subject's baselines."""
    explained = td.copy()
    for key, x in maps.items():
        explained.set(("attr", *((key,) if isinstance(key, str) else key)), x)
    draws = DRAWS if name == "sample" and subject.kind == "vector" else 1
    found = [
        perturbation_curve(
            subject.model,
            explained,
            target=subject.target,
            keys=list(subject.keys),
            groups=subject.groups,
            baseline=subject.metrics[name],
            steps=subject.steps,
            chunk_size=4096,
            seed=seed + 1000 * draw,
        ).between
        for draw in range(draws)
    ]
    return statistics.fmean(found)


def cost(tried: list[Method], td: TensorDictBase) -> list[float]:
    """What each method takes, in gradients: medians of rounds in which all have their turn, in changing order.

    It is the time of the processor, which others on the machine do not change much.
    """
    times: list[list[float]] = [[] for _ in tried]
    chance = torch.Generator().manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for method in tried:
            if method.family == "lrp":  # makes ready: the others have nothing to make
                method.explain(td, 0)
        for _ in range(ROUNDS):
            for i in torch.randperm(len(tried), generator=chance).tolist():
                if times[i] and times[i][0] > SLOW:
                    continue
                start = time.process_time()
                tried[i].explain(td, 0)
                times[i].append(time.process_time() - start)
    floor = statistics.median(
        next(each for each, method in zip(times, tried, strict=True) if method.name == FLOOR)
    )
    return [statistics.median(each) / floor for each in times]
