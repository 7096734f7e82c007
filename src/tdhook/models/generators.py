"""Random generators: what they hold, to be put back later; and what anything is that is held as it was."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from threading import current_thread, main_thread
from typing import Any, Protocol

import torch

__all__ = ["By", "Held", "drawn_by_others", "drawn_by_torch", "of_generator"]


class Held(Protocol):
    """Something as it was."""

    def changed(self) -> bool:
        """Whether it no longer is."""

    def restore(self) -> object:
        """Make it so again."""


class By:
    """Something that two functions tell of, and put back."""

    __slots__ = ("changed", "restore")

    def __init__(self, changed: Callable[[], bool], restore: Callable[[], object]) -> None:
        self.changed, self.restore = changed, restore


def of_generator(value: Any) -> Held | None:
    """The state of a random generator."""
    if isinstance(value, torch.Generator):
        state = value.get_state()
        return By(lambda: not torch.equal(value.get_state(), state), lambda: value.set_state(state))
    if isinstance(value, random.Random):
        own = value.getstate()
        return By(lambda: value.getstate() != own, lambda: value.setstate(own))
    numpy: Any = sys.modules.get("numpy.random")
    if numpy is not None and isinstance(value, numpy.Generator):
        value = value.bit_generator
    if numpy is not None and isinstance(value, numpy.BitGenerator):
        its = value.state
        return By(lambda: not _alike(value.state, its), lambda: setattr(value, "state", its))
    if numpy is not None and isinstance(value, numpy.RandomState):
        return _legacy(value.get_state, value.set_state)
    return None


def drawn_by_torch() -> Iterator[Held]:
    """The states of the random numbers of torch that are shared by all.

    Not from another thread: the main one would draw the same numbers twice.
    """
    if current_thread() is not main_thread():
        return
    state = torch.get_rng_state()
    yield By(lambda: not torch.equal(torch.get_rng_state(), state), lambda: torch.set_rng_state(state))
    if torch.cuda.is_initialized():
        devices = torch.cuda.get_rng_state_all()
        yield By(
            lambda: not all(map(torch.equal, torch.cuda.get_rng_state_all(), devices)),
            lambda: torch.cuda.set_rng_state_all(devices),
        )


def drawn_by_others() -> Iterator[Held]:
    """Likewise those of Python and numpy."""
    if current_thread() is not main_thread():
        return
    own = random.getstate()
    yield By(lambda: random.getstate() != own, lambda: random.setstate(own))
    numpy: Any = sys.modules.get("numpy.random")
    if numpy is not None:
        yield _legacy(numpy.get_state, numpy.set_state)


def _legacy(get_state: Callable[..., Any], set_state: Callable[[Any], None]) -> Held:
    """The state of one of numpy's older generators."""
    before = get_state(legacy=False)
    return By(lambda: not _alike(get_state(legacy=False), before), lambda: set_state(before))


def _alike(one: Any, other: Any) -> bool:
    """Whether two states of a generator of numpy's are the same: numbers, arrays, and dictionaries of them."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_alike(one[name], other[name]) for name in one)
    return bool((one == other).all()) if hasattr(one, "all") else bool(one == other)
