"""What a row of results amounts to."""

from __future__ import annotations

from typing import Any

__all__ = ["CONDITION", "ENOUGH", "STATUSES", "status", "worse"]

ENOUGH = {"gap": 1e-6, "flows": 1e-6, "float32": 1e-5}
"""What is ok, at most."""
CONDITION = 10
"""How many times as far off as rounding moves relevance anyhow single precision may be."""
STATUSES = ("ok", *ENOUGH, "error", "not built")


def status(row: dict[str, Any]) -> str:
    """``"ok"``, what is too large (``"gap"``, ``"flows"``, ``"float32"``), ``"error"`` or ``"not built"``."""
    if "reason" in row:
        return "not built"
    if "error" in row:
        return "error"
    return next((name for name in ENOUGH if worse(row, name)), "ok")


def worse(row: dict[str, Any], name: str) -> bool:
    """Whether a number of a row is too large, or none."""
    most = ENOUGH[name]
    if name == "float32":
        most = max(most, CONDITION * row.get("conditioning", 0.0))
    return not row[name] <= most
