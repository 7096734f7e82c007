"""TorchScript functions, inside which no operation can be seen: what they were compiled from runs in their place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Lock
from typing import Any

import torch

__all__ = ["in_python"]

_IN_PYTHON: ContextVar[bool] = ContextVar("in_python", default=False)
_COMPILED: Any = torch._C.ScriptFunction.__dict__["__call__"]
_LOCK = Lock()
_count = 0


@contextmanager
def in_python() -> Iterator[None]:
    """Have functions compiled by ``torch.jit.script`` run as the Python that they were written in."""
    if torch.compiler.is_compiling():  # which does the same
        yield
        return
    token = _IN_PYTHON.set(True)
    _replace(+1)
    try:
        yield
    finally:
        _replace(-1)
        _IN_PYTHON.reset(token)


def _replace(step: int) -> None:
    """The first of the threads that are within replaces the call of the class, the last one puts it back."""
    global _count
    with _LOCK:
        _count += step
        call = _call if _count else _COMPILED
        torch._C.ScriptFunction.__call__ = call  # type: ignore[method-assign, assignment]


def _call(function: Any, *args: Any, **kwargs: Any) -> Any:
    written = getattr(function, "_torchdynamo_inline", None) if _IN_PYTHON.get() else None
    return _COMPILED.__get__(function)(*args, **kwargs) if written is None else written(*args, **kwargs)
