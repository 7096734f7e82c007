"""RISE: what the target is where random parts of a picture are there."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import torch
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook.attribution.games import Game
from tdhook.attribution.played import Played, Playing
from tdhook.keys import under
from tdhook.perturbing.windows import SoftGrids, height_and_width, over_channels
from tdhook.targets import TargetLike

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["RISE"]


class RISE(Played):
    """The mean of the target over random soft masks, where a pixel is there (Petsiuk, Das and Saenko 2018, eq. 6).

    Masks are random grids, enlarged and shifted; all batch elements and all channels of a picture have the same. A map
    has the same sign everywhere where the target has: compare places in it, not with zero. What a pixel is worth is
    split evenly over its channels.

    Args:
        target: what is explained (:mod:`tdhook.targets`); by default the only output there is.
        masks: how many.
        cells: of the grid, along height and width.
        share: of the cells that are there, between 0 and 1.
        seed: of the masks.
        **options: those of :class:`~tdhook.attribution.played.Played` but ``features``: ``baseline``, ...

    Raises:
        ValueError: features are given, there are no masks, or what is attributed is no picture.
    """

    def __init__(
        self,
        target: TargetLike = None,
        *,
        masks: int = 1024,
        cells: int = 7,
        share: float = 0.5,
        seed: int = 0,
        **options: Unpack[Playing],
    ) -> None:
        super().__init__(target, **options)
        if self.features is not None:
            raise ValueError("RISE has pixels for features; Ablation takes features=")
        if masks < 1 or cells < 1 or not 0 < share < 1:
            raise ValueError(
                f"masks={masks} of cells={cells}, of which share={share} are there: give at least one of each, and a "
                "share between 0 and 1"
            )
        self.masks, self.cells, self.share, self.seed = masks, cells, share, seed

    def play(self, game: Game) -> Tensor:
        """One variant for each mask, of all keys at once."""
        chance, masks = random.Random(self.seed), {}
        for key in game.keys:
            shape = game.value(key).shape[1:]
            size = height_and_width(shape[game.others :], under(key), "RISE")
            others = shape[: game.others]
            masks[key] = SoftGrids(others, size, self.masks, self.cells, self.share, chance)

        def there(numbers: range) -> dict[NestedKey, Tensor]:
            return {
                key: over_channels(mask.masks(numbers), game.others, game.value(key).shape[1:])
                for key, mask in masks.items()
            }

        worth, found = game.worth_of(self.masks, there), []
        for key, mask in masks.items():
            total = torch.tensordot(worth, mask.masks(range(self.masks)).to(worth), dims=([0], [0]))
            mean = total / (self.masks * self.share)
            found.append(game.by_place(mean, key))
        return torch.cat(found, -1)
