"""The documentation's page of all methods, made of the committed results."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.faithfulness.page import number, rounded
from benchmarks.methods.measures import MEASURES
from benchmarks.methods.methods import CHANCE, METHODS
from tdhook.evaluation import interval, kendall

__all__ = ["PAGE", "RESULTS", "disagreement", "page", "ranks", "read", "values", "write"]

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "methods"
PAGE = ROOT / "docs" / "show-and-test" / "methods-compared.md"
Row = dict[str, Any]
_FAITHFUL = [name for name, each in MEASURES.items() if each.faithful]

INTRODUCTION = """\
# Methods compared

Every method on every agent and model, by every measure of [Evaluation](evaluation.md). Agents are those of
[Agents](../policies/agents.md) and of the demo, in states that they met themselves, drawn anew for each seed. Methods
that compare with a reference, and measures that replace features, have the mean of the inputs for it (pictures a blur,
sentences the mask token). That is to the favour of such methods; `curves, samples` replaces features by something else,
and [Faithfulness](faithfulness.md) tells the two apart.

The measures:

{measures}

The first {faithful} tell how right a map is; `located` needs to know what is right, as for the light that a policy has
to remember and the words that tell a language model where to go. The others tell what else there is to say of a map,
and are easily had: one that ignores the input is not changed by noise, one that picks features blindly is sparse.

The cost is processor time in units of gradient x input of the same inputs, as on the page of faithfulness.

This page is made of `benchmarks/results/methods`. What has a result is not measured again:

```bash
nox -s methods                             # what has no result yet, and write this page
nox -s methods -- demo ppo                 # of these alone
nox -s methods -- --again deeplift         # forget the results of this method first
nox -s methods -- --page                   # write the page of the results that there are
```
"""


def read(folder: Path = RESULTS) -> list[Row]:
    """The subjects that there are, in the order of their kinds and names."""
    found: list[Row] = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    order = ["vector", "sequence", "pixels"]
    return sorted(found, key=lambda row: order.index(row["kind"]))


def write(row: Row, folder: Path = RESULTS) -> None:
    """Put the results of a subject into its file, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{row['name']}.json"
    beside = file.with_suffix(".part")
    beside.write_text(json.dumps(rounded(row), indent=1) + "\n")
    os.replace(beside, file)


def values(subject: Row, measure: str) -> dict[str, list[float]]:
    """What each method has by a measure, a figure for each seed, where all its seeds have one."""
    found = {}
    for name in METHODS:
        seeds = subject["methods"].get(name, {}).get("seeds", [])
        figures = [each.get(measure) for each in seeds]
        if figures and None not in figures:
            found[name] = figures
    return found


def ranks(subject: Row, measure: str) -> dict[str, float]:
    """The place of each method by a measure, from 1 for the best; equals share the mean of theirs."""
    sign = 1 if MEASURES[measure].best else -1
    scores = {name: sign * statistics.fmean(seeds) for name, seeds in values(subject, measure).items()}
    return {
        name: 1
        + sum(other > score for other in scores.values())
        + (list(scores.values()).count(score) - 1) / 2
        for name, score in scores.items()
    }


def disagreement(subjects: Sequence[Row], one: str, other: str) -> float | None:
    """Kendall's rank correlation of the methods by two measures, mean over subjects that have both."""
    found = []
    for subject in subjects:
        first, second = ranks(subject, one), ranks(subject, other)
        both = [name for name in first if name in second]
        if len(both) > 1:
            pair = (torch.tensor([each[name] for name in both]) for each in (first, second))
            found.append(kendall(*pair).item())
    return statistics.fmean(found) if found else None


def page(subjects: Sequence[Row]) -> str:
    """The whole page."""
    told = "\n".join(
        f"- **{name}** ({'high' if each.best else 'low'} is good): {each.told}."
        for name, each in MEASURES.items()
    )
    lines = [INTRODUCTION.format(measures=told, faithful=len(_FAITHFUL))]
    if subjects:
        lines += [
            "## Ranks\n",
            *_in_short(subjects),
            *_overview(subjects),
            *_measures(subjects),
            *_methods(subjects),
            "## Each subject\n",
        ]
        for subject in subjects:
            lines += [f"### {subject['what']}\n", *_subject(subject)]
    return "\n".join(lines).rstrip("\n") + "\n"


def _overview(subjects: Sequence[Row]) -> Iterator[str]:
    yield (
        f"The mean rank over {len(subjects)} subjects, 1 for the best (methods with the same figure share theirs), by "
        "each measure; over those of faithfulness, in whose order methods are; on how many subjects the method has the "
        "best of these means; and on how many its area between the curves is larger than that of a random map, "
        "whatever features are replaced by.\n"
    )
    means, faithful, wins = _mean_ranks(subjects), _faithful(subjects), _wins(subjects)
    best = {
        measure: min((each[measure] for each in means.values() if measure in each), default=None)
        for measure in MEASURES
    }
    yield f"| method | cost, median | {' | '.join(MEASURES)} | faithful | best | better than chance |"
    yield "|---" * (len(MEASURES) + 5) + "|"
    for name in faithful:
        cost = _cost(subjects, name)
        cells = [name, "" if cost is None else number(cost)]
        for measure in MEASURES:
            mean = means[name].get(measure)
            cells.append(_bold(f"{mean:.1f}", mean == best[measure]) if mean is not None else "")
        cells += [f"{faithful[name]:.1f}", f"{wins.get(name, 0)}"]
        won, counted = _against_chance(subjects, name)
        cells.append("" if name == CHANCE else f"{won} of {counted}")
        yield f"| {' | '.join(cells)} |"
    yield ""
    failed = [
        f"- {name}, on {subject['what']}: {cell['failed']}"
        for subject in subjects
        for name, cell in subject["methods"].items()
        if "failed" in cell
    ]
    if failed:
        yield "What could not be explained:\n"
        yield from failed
        yield ""


def _in_short(subjects: Sequence[Row]) -> Iterator[str]:
    """What the tables say, in words."""
    faithful, wins = _faithful(subjects), _wins(subjects)
    ranked = [name for name in faithful if name != CHANCE]
    if not ranked:
        return
    costs = {name: _cost(subjects, name) for name in ranked}
    yield "In short:\n"
    yield (
        f"- **{ranked[0]}** is the most faithful by these measures, and the best on {wins.get(ranked[0], 0)} of "
        f"{len(subjects)} subjects; then come {', '.join(ranked[1:4])}."
    )
    cheap = [name for name in ranked if (cost := costs[name]) is not None and cost <= 2]
    if cheap:
        yield f"- Of what costs no more than two gradients, **{cheap[0]}** is."
    won = {name: _against_chance(subjects, name) for name in ranked}
    lost = [f"{name} ({above} of {of})" for name, (above, of) in won.items() if 2 * above <= of]
    if lost:
        yield f"- Better than chance on no more than half of the subjects: {', '.join(lost)}."
    within, across = _agreements(subjects)
    if within and across:
        yield (
            f"- Measures of faithfulness put the methods in much the same order (Kendall's rank correlation "
            f"{statistics.fmean(within):.2f} on average); what else there is to say does not follow it "
            f"({statistics.fmean(across):.2f})."
        )
    yield ""


def _agreements(subjects: Sequence[Row]) -> tuple[list[float], list[float]]:
    """How alike measures of faithfulness order the methods, and how alike to them the others do."""
    within, across = [], []
    names = list(MEASURES)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            found = disagreement(subjects, one, other)
            if found is not None and (one in _FAITHFUL or other in _FAITHFUL):
                (within if one in _FAITHFUL and other in _FAITHFUL else across).append(found)
    return within, across


def _mean_ranks(subjects: Sequence[Row]) -> dict[str, dict[str, float]]:
    """By method and measure, the mean over subjects that have it."""
    of: dict[str, dict[str, list[float]]] = {name: {} for name in METHODS}
    for subject in subjects:
        for measure in MEASURES:
            for name, rank in ranks(subject, measure).items():
                of[name].setdefault(measure, []).append(rank)
    return {
        name: {measure: statistics.fmean(found[measure]) for measure in MEASURES if measure in found}
        for name, found in of.items()
    }


def _faithful(subjects: Sequence[Row]) -> dict[str, float]:
    """The mean rank by measures of faithfulness, of each method, over subjects; best first."""
    found: dict[str, list[float]] = {}
    for subject in subjects:
        for name, mean in _faithful_to(subject).items():
            found.setdefault(name, []).append(mean)
    means = {name: statistics.fmean(each) for name, each in found.items()}
    return dict(sorted(means.items(), key=lambda item: item[1]))


def _faithful_to(subject: Row) -> dict[str, float]:
    """The same for one subject, of the methods that all of its measures have."""
    of = [each for measure in _FAITHFUL if (each := ranks(subject, measure))]
    whole = [name for name in METHODS if of and all(name in each for each in of)]
    return {name: statistics.fmean(each[name] for each in of) for name in whole}


def _cost(subjects: Sequence[Row], name: str) -> float | None:
    """The median over subjects."""
    costs = [cost for row in subjects if (cost := row["methods"].get(name, {}).get("cost")) is not None]
    return statistics.median(costs) if costs else None


def _wins(subjects: Sequence[Row]) -> dict[str, int]:
    """On how many subjects a method has the best mean rank by measures of faithfulness; those that share it all do."""
    found: dict[str, int] = {}
    for means in map(_faithful_to, subjects):
        for name, mean in means.items():
            if mean == min(means.values()):
                found[name] = found.get(name, 0) + 1
    return found


def _against_chance(subjects: Sequence[Row], name: str) -> tuple[int, int]:
    """On how many subjects a method has a larger area than chance, by each baseline, and of how many."""
    won = counted = 0
    for subject in subjects:
        pairs = [values(subject, measure) for measure in ("curves", "curves, samples")]
        pairs = [each for each in pairs if name in each and CHANCE in each]
        if pairs:
            counted += 1
            won += all(statistics.fmean(each[name]) > statistics.fmean(each[CHANCE]) for each in pairs)
    return won, counted


def _measures(subjects: Sequence[Row]) -> Iterator[str]:
    yield "## Do measures agree?\n"
    yield (
        "Kendall's rank correlation of the order in which two measures put the methods, mean over subjects: 1 where "
        "they agree, 0 where one says nothing of the other.\n"
    )
    names = list(MEASURES)
    yield f"| | {' | '.join(names[1:])} |"
    yield "|---" * len(names) + "|"
    for i, one in enumerate(names[:-1]):
        cells = []
        for j, other in enumerate(names[1:], 1):
            found = disagreement(subjects, one, other) if j > i else None
            cells.append("" if found is None else f"{found:.2f}")
        yield f"| {one} | {' | '.join(cells)} |"
    yield ""


def _methods(subjects: Sequence[Row]) -> Iterator[str]:
    alike: dict[tuple[str, str], list[float]] = {}
    for subject in subjects:
        told = subject.get("agreement", {"methods": [], "kendall": []})
        for one, row in zip(told["methods"], told["kendall"], strict=True):
            for other, value in zip(told["methods"], row, strict=True):
                if one != other:
                    alike.setdefault((one, other), []).append(value)
    means = {pair: statistics.fmean(each) for pair, each in alike.items()}
    yield "## Do methods agree?\n"
    yield (
        "Kendall's rank correlation of the features by two methods, mean over inputs and subjects: which is most like "
        f"each, and which least, but for the {CHANCE}; and how alike it is to all others.\n"
    )
    yield "| method | most like | least like | mean |"
    yield "|---|---|---|---|"
    for name in METHODS:
        others = {other: mean for (one, other), mean in means.items() if one == name and other != CHANCE}
        if others and name != CHANCE:
            most, least = max(others, key=others.__getitem__), min(others, key=others.__getitem__)
            mean = statistics.fmean(others.values())
            yield f"| {name} | {most} ({others[most]:.2f}) | {least} ({others[least]:.2f}) | {mean:.2f} |"
    yield ""


def _subject(subject: Row) -> Iterator[str]:
    seeds = max((len(each["seeds"]) for each in subject["methods"].values()), default=0)
    drawn = (
        "one seed"
        if seeds == 1
        else f"{seeds} seeds; after ± half the 95 % interval over these (Student's t)"
    )
    yield f"{subject['features']} features, {subject['rows']} inputs of each of {drawn}.\n"
    of = {measure: values(subject, measure) for measure in MEASURES}
    shown = [measure for measure, found in of.items() if found]
    first = {
        measure: {n for n, rank in ranks(subject, measure).items() if rank == _least(subject, measure)}
        for measure in shown
    }
    yield f"| method | cost | {' | '.join(shown)} |"
    yield "|---" * (len(shown) + 2) + "|"
    for name in METHODS:
        cell = subject["methods"].get(name, {})
        if not cell.get("seeds"):
            continue
        cost = number(cell["cost"]) if "cost" in cell else ""
        cells = [_figure(of[measure].get(name), name in first[measure]) for measure in shown]
        yield f"| {name} | {cost} | {' | '.join(cells)} |"
    yield ""


def _least(subject: Row, measure: str) -> float:
    return min(ranks(subject, measure).values())


def _figure(seeds: Sequence[float] | None, first: bool) -> str:
    if seeds is None:
        return ""
    mean = _bold(number(statistics.fmean(seeds)), first)
    if len(seeds) == 1:
        return mean
    found = interval(torch.tensor(seeds, dtype=torch.float64), how="t")
    return f"{mean} ± {number((found.high - found.mean).item())}"


def _bold(text: str, is_bold: bool) -> str:
    return f"**{text}**" if is_bold else text
