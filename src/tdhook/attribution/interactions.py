"""Interactions: what two features are worth together, beyond what each is worth."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from tensordict import TensorDictBase
from torch import Tensor

from tdhook.attribution.games import Game
from tdhook.attribution.interacting import INTERACTION, Interacting
from tdhook.attribution.played import Playing
from tdhook.attribution.shapley import Shapley, all_worths
from tdhook.perturbing.coalitions import interaction_weights
from tdhook.targets import TargetLike

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["PredDiff", "ShapleyInteraction"]


class ShapleyInteraction(Interacting, Shapley):
    """What two features add together beyond what each adds, on the mean over coalitions of the others.

    The Shapley interaction index of each pair (Grabisch and Roubens 1999, definition 2), exact, in ``2 ** n`` variants:
    written under ``"interaction"`` as ``[*batch, features, features]``, or ``[*batch, outputs, features, features]``,
    with Shapley values on the diagonal; relevance is these. Features of several keys stand one key after the other,
    in the order of their numbers; with ``features="whole"`` each key is one.

    Raises:
        ValueError: there are more than 16 features, or only one; what is attributed depends on each other; or elements
            of the batch do.
    """

    def play(self, game: Game) -> Tensor:
        """All coalitions, and what each counts for each pair."""
        if game.count < 2:
            raise ValueError(
                "interactions are those of two features or more, and there is one: say others, by features="
            )
        worth = all_worths(game, "the interactions of groups")
        weights = interaction_weights(game.count).to(worth.device)
        matrix = torch.tensordot(weights, worth, dims=1).movedim((0, 1), (-2, -1))
        game.notes[INTERACTION] = matrix
        values: Tensor = matrix.diagonal(dim1=-2, dim2=-1)
        return values


class PredDiff(Interacting):
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
        game.notes[INTERACTION] = matrix
        return alone
