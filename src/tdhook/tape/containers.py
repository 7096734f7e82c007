"""Lists and dictionaries that a function is given: what it puts into them is no output, and would be lost."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

__all__ = ["leaving_containers"]


def leaving_containers(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """``function``, which raises where it changes a list or dictionary that it is given.

    Args:
        function: the function.
        name: what it is called in the error, a :class:`NotImplementedError`.
    """

    def run(*args: object, **kwargs: object) -> Any:
        given = [(x, _copy(x)) for x in _containers((*args, *kwargs.values()))]
        result = function(*args, **kwargs)
        if any(not _is_same(_copy(x), before) for x, before in given):
            raise NotImplementedError(_CHANGES.format(name))
        return result

    return run


_CHANGES = (
    "{} changes a list or dictionary that it is given, and runs as one unit under its rule, which sees nothing but "
    "what it returns: have it return that, or leave the module to its operations"
)


def _containers(values: Iterable[object]) -> list[list[Any] | dict[Any, Any]]:
    found: list[list[Any] | dict[Any, Any]] = []
    for x in values:
        if isinstance(x, list | dict):
            found.append(x)
        if isinstance(x, list | tuple | dict):
            found += _containers(x.values() if isinstance(x, dict) else x)
    return found


def _copy(x: list[Any] | dict[Any, Any]) -> list[Any]:
    return list(x) if isinstance(x, list) else [*x, *x.values()]


def _is_same(now: list[Any], before: list[Any]) -> bool:
    return len(now) == len(before) and all(x is y for x, y in zip(now, before, strict=True))
