"""The ledger as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from tdhook.extras import require
from tdhook.relevance.ledger.ledger import REASONS, Entry, Ledger

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
        title="Where relevance went", title_justify="left"
    )
    for heading in ("module", "operation", "rule"):
        table.add_column(heading, overflow="fold")
    for heading in ("arrived", "left", *REASONS, "gap"):
        table.add_column(heading, justify="right", no_wrap=True)
    entries = ledger.summary()
    scale = max((float(entry.of("arrived").abs().sum()) for entry in entries), default=1.0)
    for entry in entries:
        kind = entry.name if entry.calls == 1 else f"{entry.name} x{entry.calls}"
        amounts = (float(entry.of(column).sum()) for column in ("arrived", "left", *REASONS))
        gap = text(_number(float(entry.gap.sum()), scale), style="bold red" if opens(entry) else "")
        table.add_row(
            entry.path or "(model)", kind, repr(entry.rule), *(_number(a, scale) for a in amounts), gap
        )
    return table


def opens(entry: Entry, tolerance: float = 1e-4) -> bool:
    """Whether relevance was lost or made at an entry, beyond a part ``tolerance`` of what passed."""
    passed = torch.maximum(entry.of("arrived").abs(), entry.of("left").abs())
    return bool((entry.gap.abs() > tolerance * passed).any())


def _number(amount: float, scale: float) -> str:
    return "" if abs(amount) < 1e-9 * scale else f"{amount:.4g}"
