"""What stands still on a page, as HTML: tables of the summary, the account, the composite, versions.

Every text of a user goes through :func:`text_html`.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import metadata

import tdhook
from tdhook.composites import Composite
from tdhook.configuration import write_target
from tdhook.markup import encodable
from tdhook.pages.preparation import View
from tdhook.rl.rollouts import Conservation
from tdhook.targets import Contrast, Target

__all__ = [
    "account_html",
    "composite_html",
    "list_html",
    "number",
    "signed",
    "summary_html",
    "target_text",
    "text_html",
    "versions",
]

_PACKAGES = ("torch", "tensordict", "torchrl")


def text_html(text: str) -> str:
    """A text as HTML that shows it letter by letter."""
    return escape(encodable(text))


def versions() -> dict[str, str]:
    """Of everything that has a part in an explanation, as far as it is installed."""
    found = {"tdhook": tdhook.__version__}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {**found, "python": platform.python_version()}


def target_text(target: object) -> str:
    """A target in the words of the command line, if it has them."""
    if isinstance(target, Contrast):
        return f"{target_text(target.a)} − {target_text(target.b)}"
    if isinstance(target, Target):
        try:
            return write_target(target)
        except TypeError:  # an index that is a tensor or a list
            return repr(target)
    if isinstance(target, str):
        return target
    return getattr(target, "__name__", repr(target))


def summary_html(view: View, shown: Sequence[int]) -> str:
    """Mean relevance of each feature by action.

    Args:
        view: what is summed up.
        shown: which rows.
    """
    summary = view.summary
    taken = [i for i, count in enumerate(summary.counts) if count]
    heads = [f"{text_html(summary.actions[i])} <span>{summary.counts[i]}×</span>" for i in taken]
    lines = []
    for row in shown:
        cells = [*(summary.by_action[action, row].item() for action in taken), summary.mean[row].item()]
        shown_cells = "".join(f'<td data-value="{cell!r}">{signed(cell)}</td>' for cell in cells)
        size = f"<td>{number(summary.magnitude[row].item())}</td>"
        lines.append(f'<tr><th scope="row">{text_html(view.rows[row])}</th>{shown_cells}{size}</tr>')
    head = "".join(
        f'<th scope="col">{head}</th>' for head in ("feature", *heads, "all steps", "mean |relevance|")
    )
    note = (
        ""
        if len(shown) == len(view.rows)
        else f"; the {len(shown)} of {len(view.rows)} features that have most"
    )
    caption = f"Mean relevance per step, by action taken{note}" if taken else f"Mean relevance per step{note}"
    return (
        f'<div class="wide"><table class="numbers"><caption>{caption}</caption><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def account_html(account: Conservation | None, composite: Composite | None, against: bool = False) -> str:
    """Where the relevance went, that of the difference from a baseline if it is ``against`` one."""
    if account is None:
        if composite is not None and any(rule.yields == "sensitivity" for _, rule in composite):
            return "<p>These rules give a modified gradient, which is not conserved: it does not sum to the target.</p>"
        return "<p>No account was kept.</p>"
    lines, share_of = [], "of what was put in" if against else "of |target|"
    for label, value, share in account.lines(against):
        part = "" if share is None else f"{share:+.1%}".replace("-", "−")
        lines.append(f'<tr><th scope="row">{label}</th><td>{signed(value)}</td><td>{part}</td></tr>')
    return (
        '<table class="numbers"><caption>Mean over the steps</caption><thead><tr><td></td><th scope="col">mean</th>'
        f'<th scope="col">{share_of}</th></tr></thead><tbody>{"".join(lines)}</tbody></table>'
        f"<p>Conservation error: <strong>{account.error:.1e}</strong>. At the worst of the steps, this part of the "
        "mean |target| is unaccounted for, lost or made on the way.</p>"
    )


def composite_html(composite: Composite | None, method: str | None = None) -> str:
    """The pairs of a composite, in their order; or what other method it was."""
    if method is not None:
        return f"<p>This relevance is by the method <code>{text_html(method)}</code>, under no rules.</p>"
    if composite is None:
        return "<p>It was not said which rules gave this relevance.</p>"
    lines = "".join(
        f"<tr><td><code>{text_html(repr(selector))}</code></td><td><code>{text_html(repr(rule))}</code></td></tr>"
        for selector, rule in composite
    )
    return (
        '<div class="wide"><table><caption>The first match wins</caption><thead><tr><th scope="col">what</th>'
        f'<th scope="col">rule</th></tr></thead><tbody>{lines}</tbody></table></div>'
    )


def list_html(entries: Mapping[str, object]) -> str:
    """Names and values as a list of definitions."""
    pairs: Iterable[tuple[str, object]] = entries.items()
    rows = (f"<div><dt>{text_html(str(k))}</dt><dd>{text_html(str(v))}</dd></div>" for k, v in pairs)
    return f"<dl>{''.join(rows)}</dl>"


def signed(value: float) -> str:
    """A number as it is shown, with its sign."""
    return number(value) if value <= 0 or math.isnan(value) else f"+{number(value)}"


def number(value: float) -> str:
    """A number as it is shown."""
    return f"{value:.4g}".replace("-", "−")
