"""Methods that tell what features do in pairs: where that is written."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict.utils import NestedKey

from tdhook.attribution.games import Game
from tdhook.attribution.means import Means
from tdhook.attribution.played import Played
from tdhook.passes.forward import Run
from tdhook.passes.runner import Runner

__all__ = ["INTERACTION", "Interacting"]

INTERACTION = "interaction"
"""Where the matrix is written, and its name among the notes of a game."""


class Interacting(Played):
    """A method that finds a number for each pair of features, and notes their matrix with the game.

    That is ``[rows, features, features]``, or ``[outputs, rows, features, features]``. The mean over references is
    written under ``"interaction"``: ``[*batch, features, features]``, or ``[*batch, outputs, features, features]``.
    """

    @property
    def writes(self) -> tuple[NestedKey, ...]:
        """The matrix, too."""
        return (*super().writes, INTERACTION)

    def note(self, runner: Runner, run: Run, games: Sequence[Game], means: Means) -> None:
        """Write the matrix, too.

        Raises:
            ValueError: there is another one, or it is none of a single element.
        """
        super().note(runner, run, games, means)
        if INTERACTION in runner.beside:
            raise ValueError(
                "what is attributed depends on each other, and interactions are those of features beside each other: "
                "name one layer, or the inputs"
            )
        if games[0].others:
            raise ValueError(
                "elements of the batch depend on each other along an axis that belongs to the features, so that "
                "interactions are none of a single element: explain batches whose elements are whole sequences"
            )
        matrix = torch.stack([game.notes[INTERACTION] for game in games]).mean(0)
        matrix = matrix.movedim(0, 1) if games[0].several else matrix
        runner.beside[INTERACTION] = matrix.reshape((*run.outputs.batch_size, *matrix.shape[1:])).to(
            games[0].full
        )
