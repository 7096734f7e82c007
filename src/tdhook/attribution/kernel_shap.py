"""Kernel SHAP: the additive model that is closest to what coalitions are worth."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tdhook.attribution.games import Game
from tdhook.attribution.played import PlayedOut, Playing
from tdhook.perturbing.coalitions import kernel_coalitions
from tdhook.tape.conditions import holds
from tdhook.targets import TargetLike

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["KernelShap"]


class KernelShap(PlayedOut):
    """Shapley values by weighted least squares over coalitions (Lundberg and Lee 2017, theorem 2).

    That the values add up to the difference from the reference is a constraint, and holds exactly. Coalitions of one
    feature and of all but one, which weigh the most, are all there, those of two and of all but two if these fit as
    well, and so on; what is left is drawn, in pairs with complements (Covert and Lee 2021, section 3.2). All batch
    elements are asked about the same. Where all coalitions fit, the values are exact.

    Args:
        target: what is explained (:mod:`tdhook.targets`); by default the only output there is.
        coalitions: how many at most, besides none and all of the features; twice as many as features tell these apart.
        seed: of the coalitions.
        **options: those of :class:`~tdhook.attribution.played.PlayedOut`: ``baseline``, ``features``, ...

    Raises:
        ValueError: the coalitions are too few to tell the features apart.
    """

    def __init__(
        self,
        target: TargetLike = None,
        *,
        coalitions: int = 2048,
        seed: int = 0,
        ledger: bool = False,
        **options: Unpack[Playing],
    ) -> None:
        super().__init__(target, ledger=ledger, **options)
        if coalitions < 2:
            raise ValueError(f"at least two coalitions are asked for, got coalitions={coalitions}")
        self.coalitions, self.seed = coalitions, seed

    def play(self, game: Game) -> Tensor:
        """All coalitions at once, and one regression for all rows and outputs."""
        empty, rise = game.empty.double(), (game.full - game.empty).double()
        if game.count == 1:
            return rise.unsqueeze(-1)
        present, weight = kernel_coalitions(game.count, self.coalitions, self.seed)
        there, root = present.to(rise), weight.to(rise).sqrt().unsqueeze(1)
        # The constraint is put in for the last feature: what the others leave of the rise is its value.
        last = there[:, -1:]
        x = (there[:, :-1] - last) * root
        square = x.T @ x
        if not holds(torch.linalg.matrix_rank(square, hermitian=True) == game.count - 1):
            raise ValueError(
                f"{len(present)} coalitions do not tell {game.count} features apart: give more coalitions "
                f"({2 * game.count} do), or group features, by features="
            )
        worth = game.worth(len(present), lambda numbers: present[numbers.start : numbers.stop])
        y = ((worth.double() - empty).flatten(1) - last * rise.flatten()) * root
        others = torch.linalg.solve(square, x.T @ y)
        values = torch.cat([others, (rise.flatten() - others.sum(0)).unsqueeze(0)])
        return values.reshape(game.count, *rise.shape).movedim(0, -1)
