"""How many examples a test draws."""

from __future__ import annotations

from typing import Any

from hypothesis import settings

__all__ = ["drawing"]


def drawing(examples: int, **options: Any) -> settings:
    """Settings of a test that draws so many examples of a hundred, and as many times more where thousands are drawn.

    Args:
        examples: how many.
        **options: those of ``hypothesis.settings``.
    """
    return settings(max_examples=max(1, examples * settings().max_examples // 100), **options)
