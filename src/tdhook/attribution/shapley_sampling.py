"""Shapley values by sampling: features join one after the other, in some orders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from tdhook.attribution.games import Game
from tdhook.attribution.means import Means
from tdhook.attribution.played import PlayedOut, Playing
from tdhook.attribution.tally import Tally, gained, require_error, write_errors
from tdhook.contexts.compared import ERROR
from tdhook.passes.forward import Run
from tdhook.passes.runner import Runner
from tdhook.perturbing.coalitions import Orders
from tdhook.targets import TargetLike

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["ShapleySampling"]


class ShapleySampling(PlayedOut):
    """What a feature adds where it joins those before it, on the mean over orders (Castro, Gómez and Tejada 2009).

    ``n - 1`` variants for each order of ``n`` features; all batch elements are asked in the same orders. However few
    orders there are, the sum over the features is the difference from the reference.

    Args:
        target: what is explained (:mod:`tdhook.targets`); by default the only output there is.
        permutations: how many orders; with ``error``, at most.
        error: the standard error, in units of the target, below which that of each feature is to be. Each batch element
            has more orders until it is; it takes sixteen independent draws to be known.
        antithetic: whether each second order is the one before, backwards (Mitchell et al. 2022, section 3.2).
        stratified: whether ``n`` orders (pairs) after each other are one shifted on place by place, so that each
            feature comes at each place equally often.
        errors: whether standard errors are written, under ``("standard_error", key)`` and of the shape of relevance.
        seed: of the orders.
        **options: those of :class:`~tdhook.attribution.played.PlayedOut`: ``baseline``, ``features``, ...

    Raises:
        ValueError: there is no order, the error is not positive or to be compiled, or an error is asked for of fewer
            than two independent draws.
    """

    def __init__(
        self,
        target: TargetLike = None,
        *,
        permutations: int = 32,
        error: float | None = None,
        antithetic: bool = True,
        stratified: bool = False,
        errors: bool = False,
        seed: int = 0,
        ledger: bool = False,
        **options: Unpack[Playing],
    ) -> None:
        super().__init__(target, ledger=ledger, **options)
        if permutations < 1:
            raise ValueError(f"at least one order of features is asked for, got permutations={permutations}")
        require_error(error, compiled=self.compile is not None)
        self.permutations, self.error, self.errors, self.seed = permutations, error, errors, seed
        self.antithetic, self.stratified = antithetic, stratified

    @property
    def writes_under(self) -> tuple[str, ...]:
        """``"standard_error"`` too, if it was asked for."""
        return (*super().writes_under, *((ERROR,) if self.errors else ()))

    def play(self, game: Game) -> Tensor:
        """Orders, as many as fit at once, until there are enough for each row."""
        orders = Orders(game.count, self.seed, antithetic=self.antithetic, stratified=self.stratified)
        draws, asks = max(1, self.permutations // orders.block), self.errors or self.error is not None
        if asks and draws < 2:
            raise ValueError(
                f"a standard error takes two independent draws, each of {orders.block} orders of the {game.count} "
                f"features, and permutations={self.permutations}: give {2 * orders.block} at least"
            )
        tally = Tally(game, orders.block)
        for some, step in tally.rounds(draws, self.error):
            tally.add(gained(some, orders.next(step)))
        game.notes[ERROR] = tally.errors()
        return tally.mean()

    def note(self, runner: Runner, run: Run, games: Sequence[Game], means: Means) -> None:
        """Write standard errors, too."""
        super().note(runner, run, games, means)
        if self.errors:
            write_errors(runner, run, games)
