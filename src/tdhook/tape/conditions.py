"""What must hold of values: found out at once, or, while a graph is traced that cannot branch on values, afterwards.

And what is known to hold of them beforehand.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook.tape.undoing import set_to

__all__ = ["assumed_nonnegative", "assuming_nonnegative", "deferred", "holds", "is_traced", "seen_to_hold"]

_NONNEGATIVE: ContextVar[Collection[NestedKey]] = ContextVar("nonnegative", default=())
_DEFERRED: ContextVar[list[Tensor] | None] = ContextVar("deferred", default=None)


def holds(condition: Tensor) -> bool:
    """Whether a condition holds for all values. Within :func:`deferred` it is taken to hold, and put on the list."""
    conditions = _DEFERRED.get()
    if conditions is None:
        return torch.compiler.is_compiling() or bool(condition.all())
    conditions.append(condition.all())
    return True


def seen_to_hold(condition: Tensor) -> bool:
    """Whether a condition is seen to hold for all values, here and now; not while a graph is traced."""
    return not is_traced() and bool(condition.all())


def is_traced() -> bool:
    """Whether a graph is traced, which cannot branch on values."""
    return _DEFERRED.get() is not None or torch.compiler.is_compiling()


@contextmanager
def assuming_nonnegative(keys: Collection[NestedKey]) -> Iterator[None]:
    """Take the values of these inputs to be non-negative."""
    with set_to(_NONNEGATIVE, keys):
        yield


def assumed_nonnegative() -> Collection[NestedKey]:
    """The inputs whose values are taken to be non-negative."""
    return _NONNEGATIVE.get()


@contextmanager
def deferred() -> Iterator[list[Tensor]]:
    """List the conditions that are met with, for whoever can look at them later."""
    conditions: list[Tensor] = []
    with set_to(_DEFERRED, conditions):
        yield conditions
