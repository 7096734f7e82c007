"""Markup: what a notebook shows."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from html import escape

__all__ = ["html_table"]


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
        f"<table><caption style='text-align:left'>{escape(caption)}</caption>",
        "<thead><tr>"
        + "".join(f"<th>{escape(heading)}</th>" for heading in headings)
        + "</tr></thead><tbody>",
    ]
    for place, row in enumerate(rows):
        style = " style='color:#b00020;font-weight:bold'" if place in marked else ""
        cells = (
            f"<td style='text-align:{'right' if i >= first_number else 'left'}'>{escape(cell)}</td>"
            for i, cell in enumerate(row)
        )
        lines.append(f"<tr{style}>{''.join(cells)}</tr>")
    return "\n".join([*lines, "</tbody></table>"])
