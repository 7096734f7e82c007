"""Shapley values: what features are worth, on the mean over all orders in which they come."""

from __future__ import annotations

from torch import Tensor

from tdhook.attribution.games import Game
from tdhook.attribution.played import PlayedOut
from tdhook.perturbing.coalitions import all_coalitions, shapley_weights

__all__ = ["MOST", "Shapley", "all_worths"]

MOST = 16
"""More features than this have too many coalitions to ask for each."""


class Shapley(PlayedOut):
    """What features are worth where each coalition of them is asked for (Shapley 1953): exact, in ``2 ** n`` variants.

    Raises:
        ValueError: there are more than 16 features.
    """

    def play(self, game: Game) -> Tensor:
        """All coalitions."""
        worth = all_worths(game, "ShapleySampling or KernelShap")
        weights = shapley_weights(game.count).to(worth.device)
        return (weights @ worth.flatten(1)).reshape(-1, *worth.shape[1:]).movedim(0, -1)


def all_worths(game: Game, otherwise: str) -> Tensor:
    """The target in each coalition, in double precision: ``[coalitions, rows]``, or ``[coalitions, outputs, rows]``.

    Args:
        game: asks.
        otherwise: what to take where there are too many.

    Raises:
        ValueError: there are too many features.
    """
    if game.count > MOST:
        raise ValueError(
            f"{game.count} features have 2 ** {game.count} coalitions, too many to ask for each ({MOST} features at "
            f"most): group them, by features=, or take {otherwise}"
        )
    return game.worth(2**game.count, lambda numbers: all_coalitions(game.count, numbers)).double()
