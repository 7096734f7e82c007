"""The ledger as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tdhook.extras import require
from tdhook.relevance.ledger.ledger import Ledger

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["ledger_table"]


def ledger_table(ledger: Ledger) -> Table:
    """One row per module or operation at each place, summed over the batch; what opens a gap stands out.

    Raises:
        ImportError: rich is not installed.
    """
    text = require("rich.text", "explained.report()").Text
    table: Table = require("rich.table", "explained.report()").Table(
        title=ledger.caption, title_justify="left"
    )
    for heading in ledger.columns[:3]:
        table.add_column(heading, overflow="fold")
    for heading in ledger.columns[3:]:
        table.add_column(heading, justify="right", no_wrap=True)
    for *cells, gap, opens in ledger.cells():
        table.add_row(*cells, text(gap, style="bold red" if opens else ""))
    return table
