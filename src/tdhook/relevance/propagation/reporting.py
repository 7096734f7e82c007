"""What rules keep of the relevance that reaches them, told to whoever keeps accounts.

Nothing here runs unless a ledger is kept. Reasons are ``"bias"``, ``"stabiliser"``, ``"stop"`` and ``"constant"``: the
share of everything that is neither an input nor a bias (a number that is added, the zeroth term of a linearisation).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeAlias

import torch
from torch import Tensor

__all__ = ["Report", "current", "reporting"]

Report: TypeAlias = Callable[[str, Tensor], None]
_REPORT: ContextVar[Report | None] = ContextVar("report", default=None)
_RANDOM: ContextVar[list[Tensor]] = ContextVar("random")


def current() -> Report | None:
    """Where the call that is being made reports to, if anywhere."""
    return _REPORT.get()


@contextmanager
def reporting(report: Report) -> Iterator[None]:
    """Have the rules of the calls within report ``(reason, amount)``."""
    token = _REPORT.set(report)
    random = _RANDOM.set(_random_state())
    try:
        yield
    finally:
        _REPORT.reset(token)
        _RANDOM.reset(random)


def _random_state() -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else ())]


def _set_random_state(state: list[Tensor]) -> None:
    torch.set_rng_state(state[0])
    if len(state) > 1:
        torch.cuda.set_rng_state_all(state[1:])
