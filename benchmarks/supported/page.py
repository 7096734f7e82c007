"""The documentation's page of supported models, made of the committed results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["PAGE", "RESULTS", "page"]

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "supported.json"
PAGE = ROOT / "docs" / "explain" / "supported.md"


def page(rows: list[dict[str, Any]]) -> str:
    return ""
