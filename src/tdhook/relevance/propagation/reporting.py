"""Reports: what rules keep of the relevance that reaches them, told to whoever keeps accounts.

Nothing is reported unless a ledger is kept. Reasons are ``"bias"``, ``"stabiliser"``, ``"stop"``, ``"constant"``: the
share of everything that is neither an input nor a bias (a number that is added, the zeroth term of a linearisation),
and ``"reconstruction"``: that of what a dictionary leaves out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tdhook.relevance.propagation.again import Again

__all__ = ["Report"]


@dataclass(frozen=True, slots=True)
class Report:
    """Where one call reports ``(reason, amount)`` to.

    Attributes:
        tell: takes reports; an amount may have any shape.
        again: what the call finds, so that it can be made once more.
    """

    tell: Callable[[str, Tensor], None]
    again: Again

    def __call__(self, reason: str, amount: Tensor) -> None:
        """Report an amount of relevance."""
        self.tell(reason, amount)

    def rounded_to(self, dtype: torch.dtype) -> Report:
        """The same of amounts that are no more exact than a precision, though computed in another."""
        return replace(self, tell=lambda reason, amount: self.tell(reason, amount.to(dtype)))
