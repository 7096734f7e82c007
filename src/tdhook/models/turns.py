"""Threads: who may change a model for a while, and who is somebody else meanwhile."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from functools import wraps
from threading import Condition, get_ident

from torch import nn

from tdhook.tape.internals import in_backward_pass
from tdhook.tape.undoing import Change, lock

__all__ = ["Turn", "elsewhere", "here"]

_LOCK = lock()
_FREE = Condition(_LOCK)
_CLAIMS: list[_Claim] = []
"""Which threads have which modules."""
_WAITING: list[_Claim] = []
"""What is waited for."""


class _Claim:
    """Some modules, by their ids, that a thread has."""

    __slots__ = ("ids", "thread")

    def __init__(self, thread: int, ids: frozenset[int]) -> None:
        self.thread, self.ids = thread, ids

    def give_up(self) -> None:
        """Leave them to others, if it was granted."""
        with _LOCK:
            if self in _CLAIMS:
                _CLAIMS.remove(self)
                if _WAITING:
                    _FREE.notify_all()


def _forget() -> None:
    """In a forked process there are no other threads."""
    global _LOCK, _FREE
    _LOCK = lock()
    _FREE = Condition(_LOCK)
    _CLAIMS.clear()
    _WAITING.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


class Turn:
    """The right to change some modules, which one thread at a time has; others wait until they are free.

    All modules are taken at once, so that two threads that want some of the same cannot each wait for the other. A
    thread may take again what it has.

    Args:
        modules: the modules.

    Attributes:
        modules: likewise.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.modules = tuple(modules)
        self._ids = frozenset(map(id, self.modules))
        self._taken: list[Change] = []
        """What the thread took by it that has it, and has not given back."""

    def __reduce__(self) -> tuple[object, ...]:
        return Turn, (self.modules,)

    def __enter__(self) -> None:
        claim = _Claim(get_ident(), self._ids)
        change = Change(claim.give_up)
        with _LOCK:
            if _CLAIMS:
                self._wait(claim)
            _CLAIMS.append(claim)
        self._taken.append(change)

    def __exit__(self, *exception: object) -> None:
        self._taken.pop().undo()

    def _wait(self, claim: _Claim) -> None:
        """Wait until no other thread has any of the modules; where that is interrupted, one is told in vain."""
        _WAITING.append(claim)
        while any(it.thread != claim.thread and not self._ids.isdisjoint(it.ids) for it in _CLAIMS):
            _FREE.wait()
        _WAITING.remove(claim)


def elsewhere(thread: int | None) -> bool:
    """Whether this is another thread than the one named, and does work of its own.

    Autograd runs parts of a backward pass in threads of its own, which belong to whoever runs the pass.
    """
    return thread is not None and get_ident() != thread and not in_backward_pass()


def here(hook: Callable[..., object]) -> Callable[..., object]:
    """A hook that does nothing where another thread calls the module."""
    thread = get_ident()

    @wraps(hook)
    def in_this_thread(*args: object, **kwargs: object) -> object:
        return None if elsewhere(thread) else hook(*args, **kwargs)

    return in_this_thread
