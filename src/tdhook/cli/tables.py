"""What the commands print, as rich tables, and the bar that they show meanwhile."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable

from rich import box
from rich.console import Console, Group
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from tensordict import TensorDictBase
from torch import nn

from tdhook.attribution.catalogue import METHODS
from tdhook.attribution.lrp import LRP
from tdhook.attribution.lrp_helpers import rules
from tdhook.composites import PRESETS, Composite
from tdhook.markup import visible
from tdhook.relevance.operations.parties import Unmatched
from tdhook.relevance.plans.plan import COLUMNS
from tdhook.rl.rollouts import Conservation, Summary

__all__ = [
    "conservation_table",
    "formula",
    "plan_table",
    "presets_table",
    "progress_bar",
    "relevance_table",
    "rules_table",
    "titled_table",
]


def titled_table(title: str, *columns: str, numbers: bool = False) -> Table:
    """An empty table; ``numbers`` are set to the right, in all columns but the first."""
    table = Table(
        title=Text(visible(title)),
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for i, column in enumerate(columns):
        table.add_column(Text(visible(column)), justify="right" if numbers and i else "left", overflow="fold")
    return table


def progress_bar() -> Progress:
    """A bar on standard error, gone when it is done; none where that is no terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def relevance_table(summary: Summary, title: str, most: int = 16) -> Table:
    """Mean relevance of each feature by action; of very many features those of the largest absolute relevance."""
    taken = [i for i, count in enumerate(summary.counts) if count]
    columns = [f"{summary.actions[i]} ({summary.counts[i]}×)" for i in taken]
    table = titled_table(title, "feature", *columns, "all steps", "mean |relevance|", numbers=True)
    shown = sorted(summary.magnitude.topk(min(most, len(summary.features))).indices.tolist())
    for i in shown:
        cells = [*(summary.by_action[action, i].item() for action in taken), summary.mean[i].item()]
        table.add_row(
            Text(visible(summary.features[i])), *map(_signed, cells), f"{summary.magnitude[i].item():.4g}"
        )
    if len(shown) < len(summary.features):
        table.caption = (
            f"the {len(shown)} of {len(summary.features)} features with the largest mean |relevance|"
        )
        table.caption_justify = "left"
    return table


def _signed(value: float) -> Text:
    return Text(f"{value:+.4g}", style="red" if value > 0 else "blue" if value < 0 else "")


def conservation_table(account: Conservation, against: bool = False) -> Group:
    """Where the relevance went, that of the difference from a baseline if it is ``against`` one."""
    share_of = "of what was put in" if against else "of |target|"
    table = titled_table("Conservation of relevance", "", "mean", share_of, numbers=True)
    for label, value, share in account.lines(against):
        table.add_row(label, f"{value:+.5g}", "" if share is None else f"{share:+.1%}")
    meaning = (
        f"Conservation error: {account.error:.1e}. At the worst of the steps, this part of the mean |target| is "
        "unaccounted for, lost or made on the way."
    )
    return Group(table, Text(meaning))


def plan_table(actor: nn.Module, composite: Composite, observed: TensorDictBase | None = None) -> Group:
    """Which rule each module of an actor gets; ``observed`` is what it reads, if that is at hand."""
    plan = LRP(composite).plan(actor, observed)
    table = titled_table(f"{type(actor).__name__}, {plan.flow} flow", *COLUMNS)
    for row in plan:
        path, *others = plan.cells(row)
        style = "" if row.rule and not row.rule.native else "dim"
        cells = (path.replace("(model)", "(the policy)"), *others)
        table.add_row(*(Text(visible(cell)) for cell in cells), style=style)
    modules = [row for row in plan if row.operation is None]
    chosen = sum(row.selector is not None for row in modules)
    default = sum(row.selector is None and row.rule is not None for row in modules)
    total = f"{chosen} modules have a rule of the composite, {default} the default of their kind"
    operations = [row for row in plan if row.operation is not None]
    if operations:
        ruled = sum(row.rule is None or not row.rule.native for row in operations)
        unknown = [row.operation or "" for row in operations if isinstance(row.selector, Unmatched)]
        total += f"; {ruled} operations have a rule, {len(operations) - ruled} need none"
        total += f"; nothing is known of {', '.join(unknown)}" if unknown else ""
    return Group(table, Text(f"{total}."))


def rules_table() -> Table:
    """All rules, each with the beginning of its own documentation."""
    table = titled_table("Rules", "rule and its parameters", "what it does")
    for name in sorted(rules.__all__):
        rule = getattr(rules, name)
        if isinstance(rule, type) and issubclass(rule, rules.Rule) and not inspect.isabstract(rule):
            text = Text(formula(rule))
            if rule.convention == "gradient":
                text.append(" [gradient convention]", style="dim")
            table.add_row(_signature(name, rule), text)
    return table


def presets_table() -> Table:
    """All presets, likewise."""
    table = titled_table("Presets", "preset and its parameters", "what it does")
    for name, function in PRESETS.items():
        table.add_row(_signature(name, function), Text(formula(function)))
    return table


def methods_table() -> Table:
    """All methods: their formulas, what they cost in gradients, what they need."""
    table = titled_table("Methods", "method", "what an entry gets", "cost", "needs")
    table.columns[0].no_wrap = True
    for name, listed in METHODS.items():
        table.add_row(Text(name, style="bold"), Text(listed.formula), Text(listed.cost), Text(listed.needs))
    return table


def _signature(name: str, function: Callable[..., object]) -> Text:
    parameters = [
        p.name if p.default is p.empty else f"{p.name}={p.default!r}"
        for p in inspect.signature(function).parameters.values()
        if p.name != "zero_params"  # of nearly all, and never what tells two of them apart
    ]
    return Text.assemble((name, "bold"), f"({', '.join(parameters)})")


def formula(documented: object) -> str:
    """The documentation of a rule or preset up to its list of arguments, as plain text."""
    text = inspect.getdoc(documented) or ""
    text = re.split(r"^(?:Args|Raises|Returns|Attributes):", text, maxsplit=1, flags=re.MULTILINE)[0]
    text = re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"\1", text.replace("``", ""))
    return " ".join(text.split())
