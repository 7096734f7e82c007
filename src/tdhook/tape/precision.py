"""Precision: in which one ``torch.autocast`` has operations compute, while a model runs and on the way back.

A backward pass goes back through what was computed, in the precision of that; autocast, which may be on around it,
would have its products of matrices computed in half precision, also where the model's were not. What is called once
more on the way is called as the model called it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TypeAlias

import torch

from tdhook.tape.internals import autocasting

__all__ = ["PLAIN", "Precision", "as_computed", "precision"]

Precision: TypeAlias = "tuple[torch.dtype | None, ...]"
"""For each kind of device, what autocast computes in; ``None`` where it is off."""

_KINDS = ("cpu", "cuda")
PLAIN: Precision = (None,) * len(_KINDS)
"""The precision of tensors that are computed with."""


def precision() -> Precision:
    """What autocast computes in right now."""
    if not autocasting():
        return PLAIN
    return tuple(
        torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None for kind in _KINDS
    )


def as_computed(wanted: Precision) -> AbstractContextManager[object]:
    """Have operations compute in a precision.

    Args:
        wanted: that of a moment, or :data:`PLAIN`.
    """
    now = precision()
    return nullcontext() if now == wanted else _changed(now, wanted)


@contextmanager
def _changed(now: Precision, wanted: Precision) -> Iterator[None]:
    with ExitStack() as stack:
        for kind, dtype, current in zip(_KINDS, wanted, now, strict=True):
            if dtype is not current:
                stack.enter_context(torch.autocast(kind, dtype, enabled=dtype is not None))
        yield
