"""Interactions: what two features are worth together, beyond what each is worth."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook.attribution.games import Game
from tdhook.attribution.means import Means
from tdhook.attribution.shapley import Shapley, all_worths
from tdhook.passes.forward import Run
from tdhook.passes.runner import Runner
from tdhook.perturbing.coalitions import interaction_weights

__all__ = ["ShapleyInteraction"]


class ShapleyInteraction(Shapley):
    """What two features add together beyond what each adds, on the mean over coalitions of the others.

    The Shapley interaction index of each pair (Grabisch and Roubens 1999, definition 2), exact, in ``2 ** n`` variants:
    written under ``"interaction"`` as ``[*batch, features, features]``, or ``[*batch, outputs, features, features]``,
    with Shapley values on the diagonal; relevance is these. Features of several keys stand one key after the other,
    in the order of their numbers; with ``features="whole"`` each key is one.

    Raises:
        ValueError: there are more than 16 features, or only one; what is attributed depends on each other; or elements
            of the batch do.
    """

    @property
    def writes(self) -> tuple[NestedKey, ...]:
        """The matrix, too."""
        return (*super().writes, "interaction")

    def play(self, game: Game) -> Tensor:
        """All coalitions, and what each counts for each pair."""
        if game.count < 2:
            raise ValueError(
                "interactions are those of two features or more, and there is one: say others, by features="
            )
        worth = all_worths(game, "the interactions of groups")
        weights = interaction_weights(game.count).to(worth.device)
        matrix = torch.tensordot(weights, worth, dims=1).movedim((0, 1), (-2, -1))
        game.notes["interaction"] = matrix
        values: Tensor = matrix.diagonal(dim1=-2, dim2=-1)
        return values

    def note(self, runner: Runner, run: Run, games: Sequence[Game], means: Means) -> None:
        """Write the matrix, too."""
        super().note(runner, run, games, means)
        if "interaction" in runner.beside:
            raise ValueError(
                "what is attributed depends on each other, and interactions are those of features beside each other: "
                "name one layer, or the inputs"
            )
        if games[0].others:
            raise ValueError(
                "elements of the batch depend on each other along an axis that belongs to the features, so that "
                "interactions are none of a single element: explain batches whose elements are whole sequences"
            )
        matrix = torch.stack([game.notes["interaction"] for game in games]).mean(0)
        matrix = matrix.movedim(0, 1) if games[0].several else matrix
        runner.beside["interaction"] = matrix.reshape(*run.outputs.batch_size, *matrix.shape[1:]).to(
            games[0].full
        )
