"""Calls in place: what they overwrite."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["overwritten", "writing"]


def overwritten(args: tuple[object, ...], kwargs: Mapping[str, object]) -> Any:
    """What a call in place writes to."""
    target = kwargs.get("out")
    if target is not None:
        return target
    return args[0] if args else kwargs["input"]


def writing(args: tuple[object, ...], kwargs: Mapping[str, object], target: object) -> tuple[object, ...]:
    """Positional arguments of a call that writes to ``target``."""
    return (target, *args[1:]) if args and kwargs.get("out") is None else args
