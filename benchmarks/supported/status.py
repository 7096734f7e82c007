"""What a row of results amounts to."""

from __future__ import annotations

from typing import Any

__all__ = ["CONDITION", "ENOUGH", "STATUSES", "status"]

ENOUGH = {"gap": 1e-6, "flows": 1e-6, "float32": 1e-5}
"""What is ok, at most."""
CONDITION = 10
"""How many times as far as rounded weights and inputs move relevance in double precision, single precision may be off."""
STATUSES = ("ok", *ENOUGH, "error", "not built")


def status(row: dict[str, Any]) -> str:
    """``"ok"``, what is too large (``"gap"``, ``"flows"``, ``"float32"``), ``"error"`` or ``"not built"``."""
    if "reason" in row:
        return "not built"
    if "error" in row:
        return "error"
    most = ENOUGH | {"float32": max(ENOUGH["float32"], CONDITION * row.get("conditioning", 0.0))}
    return next((name for name in ENOUGH if not row[name] <= most[name]), "ok")
