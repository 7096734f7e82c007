"""Tallies: what features add where they join, on the mean over orders, and how far that may be off."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from tdhook.attribution.games import Game

__all__ = ["Tally", "gained"]


def gained(game: Game, places: Tensor) -> Tensor:
    """What each feature adds to those before it.

    Args:
        game: asks.
        places: of each feature in each order, ``[orders, features]``.

    Returns:
        ``[orders, features, rows]``, or ``[orders, features, outputs, rows]``.
    """
    orders, count = places.shape
    last = game.full.expand(orders, 1, *game.full.shape)
    first = game.empty.expand(orders, 1, *game.full.shape)
    if count == 1:
        return last - first
    between = count - 1

    def before(numbers: range) -> Tensor:
        number = torch.arange(numbers.start, numbers.stop)
        return places[number // between] <= (number % between).unsqueeze(1)

    worth = game.worth(orders * between, before).reshape(orders, between, *game.full.shape)
    gains = torch.cat([worth, last], 1) - torch.cat([first, worth], 1)
    order = torch.arange(orders).unsqueeze(1)
    return gains[order.to(gains.device), places.to(gains.device)]


class Tally:
    """Sums over independent draws, each the mean of some orders, until the rows of a game have enough.

    Args:
        game: the game.

    Attributes:
        made: how many draws the rows that are still open have had.
    """

    def __init__(self, game: Game) -> None:
        shape = (game.count, *game.full.shape)
        self._total = game.full.new_zeros(shape, dtype=torch.float64)
        self._squares = torch.zeros_like(self._total)
        self._draws = game.full.new_zeros(game.rows)
        self._first = len(game)
        self._among: Tensor | None = None
        self._open = game.full.new_ones(game.rows, dtype=torch.bool)
        self.made = 0

    def add(self, gains: Tensor, block: int) -> None:
        """Add what :func:`gained` gives of so many orders for each draw, for the rows that are asked about."""
        draws = gains.double().unflatten(0, (-1, block)).mean(1)
        self.made += len(draws)
        total, squares = draws.sum(0), draws.square().sum(0)
        if self._among is None:
            self._total += total * self._open
            self._squares += squares * self._open
        else:
            some = self._open[self._among]
            self._total[..., self._among] += total * some
            self._squares[..., self._among] += squares * some
        self._draws[self._open] = self.made

    def still_open(self, game: Game, error: float) -> Game | None:
        """The game of those rows whose standard errors are not small enough yet; ``None`` where all are."""
        large = self._errors().flatten(0, -2).amax(0) > error
        self._open &= large
        first = self._open.reshape(self._first, -1).any(1).nonzero().squeeze(1)
        if not len(first):
            return None
        some = game.among(first) if len(first) < self._first else game
        if some is None:
            return game
        rows = torch.arange(game.rows, device=first.device).reshape(self._first, -1)
        self._among = rows[first].flatten() if some is not game else None
        return some

    def warn(self, error: float) -> None:
        """Say that standard errors are larger than was asked for."""
        warnings.warn(
            f"the standard error of {int(self._open.sum())} of {len(self._open)} elements of the batch is up to "
            f"{self._errors().amax():.2g} after {self.made} independent draws, which is more than error={error}: give "
            "more permutations, or a larger error",
            stacklevel=2,
        )

    def mean(self) -> Tensor:
        """What features are worth, ``[rows, features]`` or ``[outputs, rows, features]``."""
        return (self._total / self._draws).movedim(0, -1)

    def errors(self) -> Tensor:
        """The standard errors of that."""
        return self._errors().movedim(0, -1)

    def _errors(self) -> Tensor:
        mean = self._total / self._draws
        spread = (self._squares / self._draws - mean.square()).clamp(min=0)
        return (spread / (self._draws - 1)).sqrt()
