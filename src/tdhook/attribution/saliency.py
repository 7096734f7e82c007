"""Saliency by perturbation: how far a policy's outputs move where a spot of the picture is blurred."""

from __future__ import annotations

from torch import Tensor

from tdhook.attribution.games import Game
from tdhook.attribution.spotted import Spotted, every_output
from tdhook.passes.forward import Run
from tdhook.targets.base import Seeder

__all__ = ["PerturbationSaliency", "Spotted"]


class PerturbationSaliency(Spotted):
    """``1/2 |f(x) - f(x with a spot blurred)|^2`` over all outputs (Greydanus et al. 2018, equations 2 and 3).

    The logits of an actor, ``PerturbationSaliency("logits")``, or the value of a critic,
    ``PerturbationSaliency("state_value")``; of an output that is picked, it is that one's change alone. Between the
    centres of spots the map is linear, and what a pixel has is split evenly over its channels, as frames.

    Args:
        target: what is explained (:mod:`tdhook.targets`); by default all of the only output there is.
        **options: those of :class:`~tdhook.attribution.spotted.Spotted`: ``distance``, ``width``, ``baseline``, ...
    """

    def wanted(self, run: Run) -> Seeder:
        """Each of the outputs, where all of one is asked for."""
        return every_output(self.seeder, run)

    def play(self, game: Game) -> Tensor:
        """One variant for each spot."""

        def score(worth: Tensor) -> Tensor:
            square = (worth - game.full).square() / 2
            return square.sum(1) if game.several else square

        return self.spotted(game, score)
