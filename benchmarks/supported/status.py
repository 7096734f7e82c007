"""What a row of results amounts to."""

from __future__ import annotations

from typing import Any

__all__ = ["AIM", "ENOUGH", "STATUSES", "status"]

ENOUGH = {"gap": 1e-6, "flows": 1e-6, "float32": 1e-4}
"""What is ok, at most."""
AIM = 1e-5
"""What single precision is to reach."""
STATUSES = ("ok", *ENOUGH, "error", "not built")


def status(row: dict[str, Any]) -> str:
    """``"ok"``, what is too large (``"gap"``, ``"flows"``, ``"float32"``), ``"error"`` or ``"not built"``."""
    if "reason" in row:
        return "not built"
    if "error" in row:
        return "error"
    return next((name for name, most in ENOUGH.items() if not row[name] <= most), "ok")
