"""Reports: what rules keep of the relevance that reaches them, told to whoever keeps accounts.

Nothing is reported unless a ledger is kept. Reasons are ``"bias"``, ``"stabiliser"``, ``"stop"`` and ``"constant"``:
the share of everything that is neither an input nor a bias (a number that is added, the zeroth term of a
linearisation).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

__all__ = ["Report"]


def _random_state() -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else ())]


def _set_random_state(state: list[Tensor]) -> None:
    torch.set_rng_state(state[0])
    if len(state) > 1:
        torch.cuda.set_rng_state_all(state[1:])


@dataclass(frozen=True, slots=True)
class Report:
    """Where one call reports ``(reason, amount)`` to.

    Attributes:
        tell: takes reports; an amount may have any shape.
        random: the random state at the start of the call.
    """

    tell: Callable[[str, Tensor], None]
    random: list[Tensor] = field(default_factory=_random_state)

    def __call__(self, reason: str, amount: Tensor) -> None:
        """Report an amount of relevance."""
        self.tell(reason, amount)

    def rounded_to(self, dtype: torch.dtype) -> Report:
        """The same of amounts that are no more exact than a precision, though computed in another."""
        return replace(self, tell=lambda reason, amount: self.tell(reason, amount.to(dtype)))

    @contextmanager
    def as_before(self) -> Iterator[None]:
        """Draw the random numbers once more that the call drew."""
        drawn = _random_state()
        try:
            _set_random_state(self.random)
            yield
        finally:
            _set_random_state(drawn)
