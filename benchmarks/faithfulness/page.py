"""The documentation's page of how faithful explanations are, made of the committed results."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

__all__ = [
    "PAGE",
    "RECOMMENDED",
    "RESULTS",
    "joined",
    "mean_area",
    "number",
    "page",
    "read",
    "rounded",
    "summary",
    "text",
    "unmeasured",
    "write",
]

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "faithfulness" / "models.json"
PAGE = ROOT / "docs" / "show-and-test" / "faithfulness.md"
RECOMMENDED = {
    "vector": ("deeplift_shapley", "mean"),
    "sequence": ("deeplift", "mean"),
    "pixels": ("deeplift_shapley", "blur"),
}
"""The preset and the baseline, by kind of input."""
SHAPLEY = "Shapley values"
FEW = "Kernel SHAP, 4 coalitions a feature"
KINDS = {"vector": "Vectors", "sequence": "Sequences", "pixels": "Pictures"}
Row = dict[str, Any]

INTRODUCTION = """\
# Faithfulness

Features are replaced in order of their relevance, the most relevant first, or the least: the area between the two
curves of what is explained says how right the order is ([Evaluation](evaluation.md)). The larger the better; chance has
about zero. Agents are those of [Agents](../policies/agents.md) and of the demo, in states that they met themselves,
drawn anew for each seed.

A method must not win because it compares with just what the measure replaces features by. So each is measured several
times: features are replaced by zero, by their mean, by values of other states (drawn for each feature anew), in
pictures by a blur too. What *against* names is what the method itself compares with. Shapley values are exact for up to
{exact} features (for up to {several} where they are means over {samples} references), and sampled beyond. Their areas
are what can be reached, not a bound: they are the average over all orders, and a curve goes through two of them. Kernel
SHAP is asked for vectors alone, and of few coalitions: all there are where a subject has four features.

`deeplift` is epsilon without a stabiliser for linear layers, and for everything else the secant between the two inputs
([LRP against a baseline](../explain/against-a-baseline.md)); `deeplift_reveal_cancel` and `deeplift_shapley` see layers
together with the activations behind them ([what cancels](../explain/rules.md#what-cancels)). `gamma` is the gamma rule,
of 0.25, for all linear layers and convolutions, and `gamma on convolutions` for these alone. The cost is processor time
in units of gradient x input of the same inputs, a median over rounds in which methods take turns. It is that of a whole
batch: networks as small as the agents' are done in about the time that a call takes to be made, so that one more pass
costs little.

This page is made of `benchmarks/results/faithfulness/models.json`. To measure:

```bash
nox -s faithfulness                    # what has no result yet, and write this page
nox -s faithfulness -- demo ppo        # measure these anew
nox -s faithfulness -- demo --methods deeplift  # this method alone, beside the results of all others
nox -s faithfulness -- --page          # write the page of the results that there are
```
"""


ADVICE = """\
What follows from the tables:

- **For policies that see a vector, begin with `LRP("deeplift_shapley", baseline="mean")`.** Of eight agents it is worth
  96 % and more of what Shapley values are on six, for about four gradients, and on all but one (`distributional`) it is
  the best of what costs no more. Integrated gradients of 32 steps cost ten times as much, and are worth less.
- **Where contributions cancel each other** (`demo`, `dqn`, `distributional`), every method that goes from the reference
  to the input in a straight line falls behind: `deeplift` and integrated gradients alike. `deeplift_shapley` sees what
  cancels within a layer. What depends on each other across layers, which it takes one by one, is left: it reaches 89 %
  on `dqn` and 62 % on `distributional`.
- **Where a vector has few features, `KernelShap(coalitions=4 * features, baseline="mean")` is the surest:** 97 % and
  more of what Shapley values are worth on each of the eight agents, for five to eight gradients. That grows with the
  number of features (23 for the 42 of `multiagent`): for pixels it is no choice.
- **RevealCancel is less even.** It has two groups of contributions, and against zero it is sometimes worth less than
  `deeplift` (`dqn`, `td3`).
- **For pictures, `LRP("deeplift_shapley", baseline=blurred(width))`.** For agents a blur is a better reference than
  zero or the mean, by the mean over what features are replaced by, and this is worth what Shapley values are. On the
  pretrained network it is worth nearly twice the best preset without a reference; against zero, more than twice.
- **For sentences, the mask token** is one (`minilm`): `deeplift` has what sampled Shapley values have.
- **Recurrent networks cost more**: their steps are explained one by one.
- **Embeddings are not compared with zero.** A normalisation divides by nothing there, and what is found is worse than
  chance (`language`); real words, drawn from other inputs, are the best reference.
- Several drawn references cost as many explanations, and are seldom worth it elsewhere.

No preset has the name of a use for this: which is best depends on the network more than on its use.
"""


def read(file: Path = RESULTS) -> list[Row]:
    """The subjects that there are."""
    found: list[Row] = json.loads(file.read_text())["subjects"] if file.exists() else []
    return found


def write(row: Row, order: Sequence[str], file: Path = RESULTS) -> None:
    """Put the results of a subject into the file, beside those of others, which may have been written meanwhile."""
    rows = {each["name"]: each for each in read(file)} | {row["name"]: rounded(row)}
    file.parent.mkdir(parents=True, exist_ok=True)
    found = {"subjects": [rows[name] for name in order if name in rows]}
    file.write_text(json.dumps(found, indent=1) + "\n")


def joined(known: Row, row: Row, names: Sequence[str], order: Sequence[str]) -> Row:
    """Results of a subject with those of some methods that were measured later.

    Args:
        known: the results.
        row: those that were measured later.
        names: of which methods.
        order: the labels of all methods.

    Raises:
        ValueError: they are of other inputs.
    """
    for key in ("features", "rows", "seeds"):
        if known[key] != row[key]:
            raise ValueError(
                f"{row['name']} was measured with {known[key]} {key}, and now with {row[key]}: leave out --methods"
            )
    later = {each["label"]: each for each in row["methods"] if each["method"] in names}
    methods = {each["label"]: each for each in known["methods"]} | later
    return known | {"methods": [methods[label] for label in order if label in methods]}


def rounded(value: Any) -> Any:
    """All numbers within, to four digits."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    return [rounded(each) for each in value] if isinstance(value, list) else value


def mean_area(method: Row) -> float:
    """The mean area over what features are replaced by, and over seeds."""
    return statistics.fmean(statistics.fmean(seeds) for seeds in method["area"].values())


def summary(subject: Row) -> dict[str, Any]:
    """What the recommended explanation of a subject is worth beside others.

    Returns:
        ``"recommended"`` and ``"without"`` (the best preset without a reference), methods; ``"rival"``, the best other
        method that costs no more, or a twentieth more; ``"shapley"``, Shapley values against the same reference, and
        ``"best"``, those against the best one, and ``"few"``, Kernel SHAP against the same, if they were computed.
    """
    name, baseline = RECOMMENDED[subject["kind"]]
    methods = subject["methods"]
    known = {each["baseline"] for each in methods}
    baseline = baseline if baseline in known else next(each for each in ("mask", "zero") if each in known)
    recommended = next(each for each in methods if (each["method"], each["baseline"]) == (name, baseline))
    of_shapley = {each["baseline"]: each for each in methods if each["method"] == SHAPLEY}
    few = [each for each in methods if (each["method"], each["baseline"]) == (FEW, baseline)]
    others = [
        each
        for each in methods
        if each["cost"] <= 1.05 * recommended["cost"]
        and not (each["family"] == "lrp" and each["baseline"] is not None)
    ]
    presets = [each for each in methods if each["family"] == "lrp" and each["baseline"] is None]
    return {
        "recommended": recommended,
        "without": max(presets, key=mean_area),
        "rival": max(others, key=mean_area),
        "shapley": of_shapley.get(baseline),
        "best": max(of_shapley.values(), key=mean_area, default=None),
        "few": few[0] if few else None,
    }


def page(subjects: Sequence[Row]) -> str:
    """The page that belongs to results."""
    from benchmarks.faithfulness.games import EXACT, EXACT_OF_SEVERAL
    from benchmarks.faithfulness.methods import SAMPLES

    introduction = INTRODUCTION.format(exact=EXACT, several=EXACT_OF_SEVERAL, samples=SAMPLES)
    parts = [introduction, *_overview(subjects), ADVICE, *_averages(subjects)]
    for kind, heading in KINDS.items():
        of_kind = [each for each in subjects if each["kind"] == kind]
        if of_kind:
            parts.append(f"## {heading}\n")
        for subject in of_kind:
            parts += [f"### {subject['what']}\n", _told(subject), *table(subject), ""]
    return "\n".join(parts).rstrip() + "\n"


def _overview(subjects: Sequence[Row]) -> Iterator[str]:
    yield "## In short\n"
    yield (
        "What is recommended, beside the best preset without a reference, the best other method that costs no more "
        "(no LRP against a reference), and Shapley values: areas, means over what features are replaced by. Beside it, "
        f"what {FEW} is worth of Shapley values against the same reference, and its cost.\n"
    )
    columns = ("recommended", "cost", "area", "without a reference", "at no more cost")
    columns += ("of Shapley, same reference", "of the best Shapley", "Kernel SHAP")
    yield f"| | {' | '.join(columns)} |"
    yield "|---" * (len(columns) + 1) + "|"
    for subject in subjects:
        found = summary(subject)
        area = mean_area(found["recommended"])
        shares = [
            f"{100 * area / mean_area(found[key]):.0f} %" if found[key] else "" for key in ("shapley", "best")
        ]
        few = found["few"]
        if few is None or found["shapley"] is None:
            shares.append("")
        else:
            share = 100 * mean_area(few) / mean_area(found["shapley"])
            shares.append(f"{share:.0f} %, {number(few['cost'])}")
        cells = [
            f"`{subject['name']}`",
            found["recommended"]["label"],
            number(found["recommended"]["cost"]),
            number(area),
            *(f"{found[key]['label']}: {number(mean_area(found[key]))}" for key in ("without", "rival")),
            *shares,
        ]
        yield f"| {' | '.join(cells)} |"
    yield ""
    missing = [f"`{name}`" for name in unmeasured(subjects)]
    if missing:
        yield f"Without results so far: {', '.join(missing)}.\n"


def unmeasured(subjects: Sequence[Row]) -> list[str]:
    """The agents of examples/agents that have no results."""
    measured = {each["name"] for each in subjects} | {
        "dictionary"
    }  # of the language policy, and no agent itself
    checkpoints = (ROOT / "examples" / "agents" / "checkpoints").glob("*.pt")
    return sorted(path.stem for path in checkpoints if path.stem not in measured)


def _averages(subjects: Sequence[Row]) -> Iterator[str]:
    """Each method's mean over the subjects of a kind, as a share of the best of each subject."""
    for kind, heading in KINDS.items():
        of_kind = [each for each in subjects if each["kind"] == kind]
        if len(of_kind) < 2:
            continue
        shares: dict[str, list[float]] = {}
        costs: dict[str, list[float]] = {}
        for subject in of_kind:
            best = max(map(mean_area, subject["methods"]))
            for method in subject["methods"]:
                shares.setdefault(method["label"], []).append(mean_area(method) / best)
                costs.setdefault(method["label"], []).append(method["cost"])
        whole = {label: each for label, each in shares.items() if len(each) == len(of_kind)}
        yield f"{heading}: the area of each method as a share of the largest of its subject, mean and least.\n"
        yield "| method | cost, median | mean | least |"
        yield "|---|---|---|---|"
        for label, each in sorted(whole.items(), key=lambda item: -statistics.fmean(item[1])):
            cost = number(statistics.median(costs[label]))
            yield f"| {label} | {cost} | {100 * statistics.fmean(each):.0f} % | {100 * min(each):.0f} % |"
        yield ""


def _told(subject: Row) -> str:
    seeds = "one seed" if subject["seeds"] == 1 else f"{subject['seeds']} seeds"
    spread = "" if subject["seeds"] == 1 else "; in parentheses the standard deviation over seeds"
    return f"{subject['features']} features, {subject['rows']} inputs of each of {seeds}{spread}.\n"


def table(subject: Row) -> Iterator[str]:
    """The table of a subject: what is replaced by what, in columns."""
    metrics = list(subject["methods"][0]["area"])
    yield f"| method | cost | {' | '.join(metrics)} | mean |"
    yield "|---" * (len(metrics) + 3) + "|"
    for method in subject["methods"]:
        areas = [_area(method["area"][name]) for name in metrics]
        cells = [method["label"], number(method["cost"]), *areas, number(mean_area(method))]
        yield f"| {' | '.join(cells)} |"


def text(subject: Row) -> str:
    """The same for a terminal."""
    return "\n".join([f"{subject['what']} ({subject['seconds']} s)", *table(subject)])


def _area(seeds: Sequence[float]) -> str:
    spread = f" ({number(statistics.stdev(seeds))})" if len(seeds) > 1 else ""
    return number(statistics.fmean(seeds)) + spread


def number(value: float) -> str:
    """To three digits, as text."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
