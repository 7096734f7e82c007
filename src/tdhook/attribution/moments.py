"""Moments: what is written of many explanations, and how far they spread."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypeAlias

from tensordict.utils import NestedKey
from torch import Tensor

from tdhook.attribution.means import Means
from tdhook.contexts.compared import ERROR, SPREAD, write_under
from tdhook.passes.forward import Run
from tdhook.passes.runner import Runner

__all__ = ["Moment", "Moments"]

Moment: TypeAlias = Literal["mean", "squares", "variance"]
"""Of relevance: its mean, that of its squares, or its variance."""


class Moments:
    """What is written of explanations, which are told a few at a time.

    Args:
        of: the moment that is relevance.
        spread: whether the standard deviation is written too, and the standard error.
    """

    def __init__(self, of: Moment, spread: bool) -> None:
        self._of, self._spread = of, spread
        self._means = Means(spread or of == "variance")

    @staticmethod
    def require(of: str, spread: bool, samples: int) -> None:
        """So many explanations have the moment, and spread if that is asked for.

        Raises:
            ValueError: there is no such moment, or no spread of one explanation.
        """
        if of not in ("mean", "squares", "variance"):
            raise ValueError(f"of is 'mean', 'squares' or 'variance', got {of!r}")
        if samples < 2 and (spread or of == "variance"):
            raise ValueError("one explanation has no spread: draw several, by samples")

    def add(self, found: Mapping[NestedKey, Tensor]) -> None:
        """Add explanations, ``[explanations, *source]`` or ``[explanations, outputs, *source]`` by source."""
        count = len(next(iter(found.values()))) if found else 0
        squares = self._of == "squares"
        self._means.add_all({key: x.square() for key, x in found.items()} if squares else found, count)

    def written(self, runner: Runner, run: Run) -> dict[NestedKey, Tensor]:
        """The moment by source, ``[*source]`` or ``[outputs, *source]``; what tells of the spread is written."""
        deviations = self._means.deviations()
        if self._spread:
            root = self._means.count**0.5
            write_under(SPREAD, runner, run, deviations)
            write_under(ERROR, runner, run, {key: value / root for key, value in deviations.items()})
        variance = self._of == "variance"
        return {key: x.square() for key, x in deviations.items()} if variance else self._means.mean
