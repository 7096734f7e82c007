"""Undoing: what is changed outside of an explanation is put back, whatever interrupts it, and whenever.

A ``with`` block or a ``finally`` puts things back unless it is interrupted itself: an interrupt may come at any
instruction, on the way into such a block or out of it. So each change is noted before it is made, and what is still
noted when an explanation ends by an exception is put back then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from threading import RLock, local
from typing import Any, Generic, TypeAlias, TypeVar
from weakref import ref

import torch
from torch import nn

from tdhook.tape.internals import (
    function_modes,
    hook_tables_of,
    saved_tensors_hooks_on_top,
    set_function_modes,
    set_torch_functions_seen,
    torch_functions_seen,
    without_saved_tensors_hooks,
)

__all__ = ["Change", "Hook", "Undoing", "all_of", "hooked", "lock", "set_to", "undone", "undone_where_raised"]

Hook: TypeAlias = "tuple[Callable[..., Any], Callable[..., object], dict[str, bool]]"
"""A method that registers a hook, such as ``module.register_forward_hook``, the hook, and how."""

T = TypeVar("T")

_HERE = local()
# The block that this thread is in is held weakly there: where its end was interrupted, it is gone all the same.
_NOTHING = nullcontext()
_LOCKS: list[RLock] = []
_MOST_INTERRUPTS = 3


class Change:
    """A change that is put back once: by whoever makes it, or else when the explanation ends.

    Args:
        put_back: makes it what it was, also where it was not changed yet, or is what it was already.
    """

    __slots__ = ("_put_back",)

    def __init__(self, put_back: Callable[[], object]) -> None:
        self._put_back: Callable[[], object] | None = put_back
        within: ref[Undoing] | None = getattr(_HERE, "innermost", None)
        block = None if within is None else within()
        if block is not None:
            block.changes.append(self)

    def undo(self) -> None:
        """Put it back, unless it was."""
        put_back = self._put_back
        if put_back is not None:
            put_back()
            self._put_back = None


@contextmanager
def undone(put_back: Callable[[], object]) -> Iterator[None]:
    """Put a change back that is made within."""
    change = Change(put_back)
    try:
        yield
    finally:
        change.undo()


@contextmanager
def undone_where_raised(put_back: Callable[[], object]) -> Iterator[None]:
    """Put a change back that is made within, where the block raises."""
    done = False
    change = Change(lambda: None if done else put_back())
    try:
        yield
        done = True
    finally:
        change.undo()


class set_to(Generic[T]):
    """Give a context variable a value within."""

    __slots__ = ("_change", "_value", "_variable")

    def __init__(self, variable: ContextVar[T], value: T) -> None:
        self._variable, self._value = variable, value

    def __enter__(self) -> None:
        self._change = Change(partial(self._variable.set, self._variable.get()))
        self._variable.set(self._value)

    def __exit__(self, *exception: object) -> None:
        self._change.undo()


@contextmanager
def hooked(*hooks: Hook) -> Iterator[None]:
    """Put hooks on modules within.

    Args:
        hooks: each with the method that registers it.
    """
    put = {id(hook): hook for _, hook, _ in hooks}
    modules: list[nn.Module] = [register.__self__ for register, _, _ in hooks]  # type: ignore[attr-defined]
    change = Change(lambda: _take_off(modules, put))
    try:
        for register, hook, keywords in hooks:
            register(hook, **keywords)
        yield
    finally:
        change.undo()


def _take_off(modules: Sequence[nn.Module], put: Mapping[int, object]) -> None:
    for module in modules:
        hooks, marks = hook_tables_of(module)
        for number in [number for table in hooks for number, hook in table.items() if id(hook) in put]:
            for mark in marks:
                mark.pop(number, None)
            for table in hooks:  # last, as its number is found by the hook
                table.pop(number, None)


def all_of(*contexts: AbstractContextManager[object] | None) -> AbstractContextManager[object]:
    """Enter contexts one after the other, as far as there are any."""
    there = [*filter(None, contexts)]
    if len(there) < 2:
        return there[0] if there else _NOTHING
    return _one_after_the_other(there)


@contextmanager
def _one_after_the_other(contexts: Sequence[AbstractContextManager[object]]) -> Iterator[None]:
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


def lock() -> RLock:
    """A lock for what takes no time: where that is interrupted, it is let go when the explanation ends."""
    _LOCKS.append(RLock())
    return _LOCKS[-1]


def _let_go(held: RLock) -> None:
    try:
        while True:
            held.release()
    except RuntimeError:  # it is not this thread's
        pass


class Undoing:
    """A block at whose end, where it raises, all changes are undone that are noted within it, in this thread.

    The modes of torch that were on when it began are on again, too. So are gradients, in any case.

    Attributes:
        changes: those that were noted, which are undone unless somebody did before.
    """

    __slots__ = ("__weakref__", "_grad", "_hooks", "_modes", "_outer", "_seen", "changes")

    def __enter__(self) -> None:
        self.changes: list[Change] = []
        self._outer: ref[Undoing] | None = getattr(_HERE, "innermost", None)
        self._grad, self._modes = torch.is_grad_enabled(), function_modes()
        self._seen, self._hooks = torch_functions_seen(), saved_tensors_hooks_on_top()
        _HERE.innermost = ref(self)

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            for _ in range(_MOST_INTERRUPTS):  # it may be interrupted as well
                try:
                    self._undo()
                    break
                except KeyboardInterrupt:
                    continue
        elif torch.is_grad_enabled() is not self._grad:
            torch.set_grad_enabled(self._grad)
        _HERE.innermost = self._outer

    def _undo(self) -> None:
        for held in _LOCKS:
            _let_go(held)
        without_saved_tensors_hooks(self._hooks)
        set_torch_functions_seen(self._seen)
        set_function_modes(self._modes)
        for change in reversed(self.changes):
            change.undo()
        torch.set_grad_enabled(self._grad)
