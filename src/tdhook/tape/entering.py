"""Entering: torch functions that are written in Python, from the inside."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, TypeAlias

__all__ = ["entered"]

Function: TypeAlias = Callable[..., Any]

_INSIDE: dict[object, Function | None] = {}


def entered(function: Function) -> Function | None:
    """A torch function written in Python, without the check at its start that hands it to a ``TorchFunctionMode``.

    Run under the mode, the operations inside it are seen one by one. ``None`` for functions written in C++.
    """
    if function not in _INSIDE:
        _INSIDE[function] = _unchecked(function)
    return _INSIDE[function]


def _unchecked(function: object) -> Function | None:
    if not isinstance(function, types.FunctionType) or not function.__module__.startswith("torch"):
        return None
    checks = {f"has_torch_function{suffix}": _no for suffix in ("", "_unary", "_variadic")}
    inside = types.FunctionType(
        function.__code__,
        {**function.__globals__, **checks},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    inside.__kwdefaults__ = function.__kwdefaults__
    return inside


def _no(*args: object) -> bool:
    return False
