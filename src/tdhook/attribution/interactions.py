"""Interactions: what two features are worth together, beyond what each is worth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook.attribution.games import Game
from tdhook.attribution.means import Means
from tdhook.attribution.played import Played, Playing
from tdhook.attribution.shapley import Shapley, all_worths
from tdhook.passes.forward import Run
from tdhook.passes.runner import Runner
from tdhook.perturbing.coalitions import interaction_weights
from tdhook.targets import TargetLike

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["PredDiff", "ShapleyInteraction"]


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
        _write_matrix(runner, run, games)


class PredDiff(Played):
    """What the target loses where features have the values that they have elsewhere, one by one and in pairs.

    ``f(x) - mean of f(x with a feature of other data)`` (Robnik-Sikonja and Kononenko 2008); and of each pair what the
    two lose alone, beyond what they lose together (Blücher, Vielhaben and Strodthoff 2022, where it has the other
    sign): written under ``"interaction"`` as ``[*batch, features, features]``, or
    ``[*batch, outputs, features, features]``, with what each loses on the diagonal. It takes ``n (n + 1) / 2`` variants
    for each of the drawn values, and is not complete.

    Args:
        target: what is explained (:mod:`tdhook.targets`); by default the only output there is.
        **options: those of :class:`~tdhook.attribution.played.Played`: ``features``, ...; ``baseline`` is by default
            ``"sample"`` of the batch, and ``samples`` 16 where values are drawn.

    Raises:
        ValueError: what is attributed depends on each other; or elements of the batch do.
    """

    def __init__(self, target: TargetLike = None, **options: Unpack[Playing]) -> None:
        baseline = options.setdefault("baseline", "sample")
        if isinstance(baseline, TensorDictBase) or (isinstance(baseline, str) and baseline == "sample"):
            options.setdefault("samples", 16)
        super().__init__(target, **options)

    @property
    def writes(self) -> tuple[NestedKey, ...]:
        """The matrix, too."""
        return (*super().writes, "interaction")

    def play(self, game: Game) -> Tensor:
        """A variant for each feature, and for each pair."""
        one, other = torch.triu_indices(game.count, game.count)
        place = torch.arange(game.count)

        def present(numbers: range) -> Tensor:
            some = slice(numbers.start, numbers.stop)
            left: Tensor = (place != one[some].unsqueeze(1)) & (place != other[some].unsqueeze(1))
            return left

        lost = (game.full - game.worth(len(one), present)).movedim(0, -1)
        both = lost.new_zeros(*lost.shape[:-1], game.count, game.count)
        both[..., one, other] = lost
        both[..., other, one] = lost
        alone: Tensor = both.diagonal(dim1=-2, dim2=-1).clone()
        matrix = alone.unsqueeze(-1) + alone.unsqueeze(-2) - both
        game.notes["interaction"] = matrix
        return alone

    def note(self, runner: Runner, run: Run, games: Sequence[Game], means: Means) -> None:
        """Write the matrix, too."""
        super().note(runner, run, games, means)
        _write_matrix(runner, run, games)


def _write_matrix(runner: Runner, run: Run, games: Sequence[Game]) -> None:
    """Write the mean of the matrices of interactions over references.

    Raises:
        ValueError: there is another one, or it is none of a single element.
    """
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
    runner.beside["interaction"] = matrix.reshape((*run.outputs.batch_size, *matrix.shape[1:])).to(
        games[0].full
    )
