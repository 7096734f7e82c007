"""Tallies: what features add where they join, on the mean over draws of orders, and how far that may be off."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tdhook.attribution.games import Game
from tdhook.contexts.compared import ERROR, write_under
from tdhook.passes.forward import Run
from tdhook.passes.runner import Runner

__all__ = ["Tally", "gained", "require_error", "write_errors"]

_FIRST, _AT_ONCE = 16, 2**22
"""Draws that there are before their spread is believed, and numbers that those made together may yield."""


def require_error(error: float | None, *, compiled: bool) -> None:
    """A standard error can be drawn for until it is reached, if there is one.

    Raises:
        ValueError: it is not positive, or a graph would have to know how many draws it takes.
    """
    if error is None:
        return
    if not error > 0:
        raise ValueError(f"a standard error is a positive number, got error={error}")
    if compiled:
        raise ValueError(
            "how many orders a standard error takes is seen as it goes, which no graph does: give permutations"
        )


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
        block: how many orders are one draw.
    """

    def __init__(self, game: Game, block: int) -> None:
        self._game, self._block, self._made = game, block, 0
        self._total = game.full.new_zeros((game.count, *game.full.shape), dtype=torch.float64)
        self._squares = torch.zeros_like(self._total)
        self._draws = game.full.new_zeros(game.rows)
        self._among: Tensor | None = None
        self._open = game.full.new_ones(game.rows, dtype=torch.bool)

    def rounds(self, draws: int, error: float | None = None) -> Iterator[tuple[Game, int]]:
        """Who is asked next, and how many draws are made for that; what these give is to be added in between.

        Args:
            draws: how many there are; with ``error``, at most.
            error: the standard error below which that of each feature is to be. Rows where it is are asked no more; it
                warns where it never is.
        """
        at_once = max(1, _AT_ONCE // (self._total.numel() * self._block))
        some: Game | None = self._game
        while some is not None and self._made < draws:
            step = min(at_once, draws - self._made)
            if error is not None:
                step = min(step, max(_FIRST - self._made, self._made // 4))
            yield some, step
            if error is not None and self._made >= min(_FIRST, draws):
                some = self._still_open(error)
        if error is not None and some is not None:
            self._warn(error)

    def add(self, gains: Tensor) -> None:
        """Add what :func:`gained` gives of the orders of some draws, for the rows that are asked about."""
        draws = gains.double().unflatten(0, (-1, self._block)).mean(1)
        self._made += len(draws)
        total, squares = draws.sum(0), draws.square().sum(0)
        if self._among is None:
            self._total += total * self._open
            self._squares += squares * self._open
        else:
            some = self._open[self._among]
            self._total[..., self._among] += total * some
            self._squares[..., self._among] += squares * some
        self._draws[self._open] = self._made

    def mean(self) -> Tensor:
        """What features are worth, ``[rows, features]`` or ``[outputs, rows, features]``."""
        return (self._total / self._draws).movedim(0, -1)

    def errors(self) -> Tensor:
        """The standard errors of that."""
        return self._errors().movedim(0, -1)

    def _still_open(self, error: float) -> Game | None:
        """The game of those rows whose standard errors are not small enough yet; ``None`` where all are."""
        game, count = self._game, len(self._game)
        self._open &= self._errors().flatten(0, -2).amax(0) > error
        first = self._open.reshape(count, -1).any(1).nonzero().squeeze(1)
        if not len(first):
            return None
        some = game.among(first) if len(first) < count else game
        if some is None:
            return game
        rows = torch.arange(game.rows, device=first.device).reshape(count, -1)
        self._among = rows[first].flatten() if some is not game else None
        return some

    def _warn(self, error: float) -> None:
        """Say that standard errors are larger than was asked for."""
        warnings.warn(
            f"the standard error of {int(self._open.sum())} of {len(self._open)} elements of the batch is up to "
            f"{self._errors().amax():.2g} after {self._made} independent draws, which is more than error={error}: give "
            "more permutations, or a larger error",
            stacklevel=2,
        )

    def _errors(self) -> Tensor:
        mean = self._total / self._draws
        spread = (self._squares / self._draws - mean.square()).clamp(min=0)
        return (spread / (self._draws - 1)).sqrt()


def write_errors(runner: Runner, run: Run, games: Sequence[Game]) -> None:
    """Write the standard errors of the mean over games that have noted theirs, by source and of its shape."""
    each = [game.by_source(game.notes[ERROR]) for game in games]
    found = {
        key: torch.stack([one[key] for one in each]).square().sum(0).sqrt() / len(each) for key in each[0]
    }
    write_under(ERROR, runner, run, found)
