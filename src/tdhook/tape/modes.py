"""Modes: what sees torch functions while a pass is watched, and how something is kept out of its sight."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from inspect import ismethod
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from tdhook.tape.internals import function_modes, pop_mode, push_mode, set_function_modes, top_mode

__all__ = ["ONLY_TENSORS", "Watching", "answered", "beneath", "unwatched"]

ONLY_TENSORS = (Tensor,)
"""The types that a mode is given with a function of plain tensors that is written in Python."""


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


def answered(
    mode: TorchFunctionMode, func: Callable[..., Any], types: Iterable[type], args: Any, kwargs: Any
) -> Any:
    """What a class that is no tensor, such as TensorDict, makes of a torch function, in sight of the mode that got it.

    Such a class computes it with torch functions on tensors. Left to torch, these would run in sight of no mode.

    Args:
        mode: sees what is computed.
        func: the function.
        types: those that the mode was given with the function; none of plain tensors.
        args: its arguments by place.
        kwargs: its arguments by name.

    Returns:
        ``NotImplemented`` where there is no such class, or none that knows the function.
    """
    for kind in types:
        if issubclass(kind, Tensor) or not ismethod(ask := getattr(kind, "__torch_function__", None)):
            continue
        outer = function_modes()
        push_mode(mode)
        try:
            found = ask(func, types, args, kwargs or {})
        finally:
            set_function_modes(outer)
        if found is not NotImplemented:
            return found
    return NotImplemented
