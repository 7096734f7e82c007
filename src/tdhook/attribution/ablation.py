"""Ablation: what the target loses with each feature."""

from __future__ import annotations

import torch
from torch import Tensor

from tdhook.attribution.games import Game
from tdhook.attribution.played import Played

__all__ = ["Ablation"]


class Ablation(Played):
    """``f(x) - f(x without a feature)``, for each feature alone (Zeiler and Fergus 2014; leave one out).

    Features that stand in for each other lose nothing alone, so that sums are not complete; those of :class:`Shapley`
    are.
    """

    def play(self, game: Game) -> Tensor:
        """One variant for each feature."""
        places = torch.arange(game.count)
        worth = game.worth(game.count, lambda numbers: places != places[numbers.start : numbers.stop, None])
        return (game.full - worth).movedim(0, -1)
