"""Markup: what a notebook shows, and names as they are shown anywhere."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from html import escape

__all__ = ["encodable", "html_table", "shown", "visible"]

# Control characters, line and paragraph separators, what turns the direction of writing, and halves of surrogate pairs.
_UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """A name in one line, as it is; what cannot be seen or encoded is written out, by its number after a backslash."""
    return _UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def encodable(text: str) -> str:
    """A text as it is; halves of surrogate pairs, which no file can hold, are written out."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def shown(*values: object) -> str:
    """What a notebook shows of some values, one below the other, as far as they say it."""
    told = (getattr(value, "_repr_html_", None) for value in values)
    return "".join(str(tell()) for tell in told if tell is not None)


def html_table(
    caption: str,
    headings: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    numbers: int = 0,
    marked: Collection[int] = (),
) -> str:
    """A table as HTML, its text escaped.

    Args:
        caption: what stands above it.
        headings: of the columns.
        rows: the cells of each row.
        numbers: how many of the last columns hold numbers.
        marked: rows, by their place, that stand out.
    """
    first_number = len(headings) - numbers
    lines = [
        f"<table><caption style='text-align:left'>{_text(caption)}</caption>",
        "<thead><tr>"
        + "".join(f"<th>{_text(heading)}</th>" for heading in headings)
        + "</tr></thead><tbody>",
    ]
    for place, row in enumerate(rows):
        style = " style='color:#b00020;font-weight:bold'" if place in marked else ""
        cells = (
            f"<td style='text-align:{'right' if i >= first_number else 'left'}'>{_text(cell)}</td>"
            for i, cell in enumerate(row)
        )
        lines.append(f"<tr{style}>{''.join(cells)}</tr>")
    return "\n".join([*lines, "</tbody></table>"])


def _text(text: str) -> str:
    return escape(encodable(text))
