"""Modes: what sees torch functions while a pass is watched, and how something is kept out of its sight."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch.overrides import TorchFunctionMode

from tdhook.tape.internals import pop_mode, push_mode, top_mode

__all__ = ["Watching", "beneath", "unwatched"]


class Watching(TorchFunctionMode):
    """A mode that watches one pass; a pass within another is watched by its own mode alone."""


@contextmanager
def unwatched() -> Iterator[None]:
    """Run in sight of no mode that watches another pass."""
    modes = []
    while (mode := top_mode()) is not None:
        modes.append(pop_mode())
    try:
        for mode in reversed(modes):
            if not isinstance(mode, Watching):
                push_mode(mode)
        yield
    finally:
        while top_mode() is not None:
            pop_mode()
        for mode in reversed(modes):
            push_mode(mode)


@contextmanager
def beneath(mode: TorchFunctionMode) -> Iterator[None]:
    """Run out of sight of a mode that is on, in sight of the others."""
    above = []
    while (top := pop_mode()) is not mode:
        above.append(top)
    for other in reversed(above):
        push_mode(other)
    try:
        yield
    finally:
        for _ in above:
            pop_mode()
        push_mode(mode)
        for other in reversed(above):
            push_mode(other)
