"""Spots: methods that blur a picture in one place after the other, and look at all that a policy says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor

from tdhook.attribution.games import Game
from tdhook.attribution.played import Played, Playing
from tdhook.keys import under
from tdhook.passes.forward import Run
from tdhook.perturbing.baselines import blurred
from tdhook.perturbing.windows import Spots, height_and_width, over_channels
from tdhook.targets import TargetLike
from tdhook.targets.base import Around, Seeder
from tdhook.targets.computed import Derived
from tdhook.targets.outputs import Target

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Spotted", "every_output"]


class Spotted(Played):
    """A method that blurs spots of a picture, one after the other (Greydanus et al. 2018, equation 1).

    Args:
        target: what is explained (:mod:`tdhook.targets`).
        distance: between the centres of spots, in pixels.
        width: standard deviation of a spot, in pixels.
        **options: those of :class:`~tdhook.attribution.played.Played` but ``features``; ``baseline`` is by default a
            blur of three pixels.

    Raises:
        ValueError: features are given, the distance or the width is not positive, or what is attributed is no picture.
    """

    def __init__(
        self,
        target: TargetLike = None,
        *,
        distance: int = 5,
        width: float = 5.0,
        **options: Unpack[Playing],
    ) -> None:
        options.setdefault("baseline", blurred(3.0))
        super().__init__(target, **options)
        who = type(self).__name__
        if self.features is not None:
            raise ValueError(f"{who} has spots for features; Ablation takes features=")
        if distance < 1 or not width > 0:
            raise ValueError(
                f"spots lie at least one pixel apart and have a positive width, got distance={distance}, width={width}"
            )
        self.distance, self.width = distance, width

    def spotted(self, game: Game, score: Callable[[Tensor], Tensor]) -> Tensor:
        """A map for each key, by entry.

        Args:
            game: asks.
            score: of spots, ``[spots, rows]``, given the target there, ``[spots, rows]`` or ``[spots, outputs, rows]``.
        """
        found = []
        for key in game.keys:
            shape = game.value(key).shape[1:]
            others = shape[: game.others]
            height_and_width(shape[game.others :], under(key), type(self).__name__)
            spots = Spots(tuple(shape), self.distance, self.width)

            def there(
                numbers: range, key: NestedKey = key, spots: Spots = spots, others: torch.Size = others
            ) -> dict[NestedKey, Tensor]:
                number = torch.arange(numbers.start, numbers.stop)
                at = (torch.arange(others.numel()) == (number // spots.count).unsqueeze(1)).double()
                masks = at.reshape(-1, *others, 1, 1) * spots.masks(number % spots.count).reshape(
                    -1, *(1,) * len(others), *spots.shape[-2:]
                )
                return {key: 1 - over_channels(masks, len(others), spots.shape)}

            scores = score(game.worth_of(others.numel() * spots.count, there)).movedim(0, -1)
            maps = spots.spread_out(scores.reshape(*scores.shape[:-1], *others, spots.count))
            found.append(game.by_place(maps, key))
        return torch.cat(found, -1)


def every_output(target: Seeder, run: Run, *, always: bool = False) -> Seeder:
    """Each of the outputs separately, where a target is all of one; ``always``, whichever of them it picks."""
    if isinstance(target, Around):
        around = target.around(every_output(target.inner(), run, always=always))
        if around is not None:
            return around
    if isinstance(target, Target):
        return Target(target.key, "all") if always or target.index is None else target
    seeds = run.seeds(target)
    if seeds.keys[0] in map(unravel_key, target.writes):  # which only that target computes
        computed = target
        while isinstance(computed, Around):
            computed = computed.inner()
        picks = always and isinstance(computed, Derived) and computed.index is not None
        return cast(Seeder, replace(cast(Any, computed), index="all")) if picks else target
    whole = len(seeds.keys) == 1 and (always or (seeds.several is None and bool((seeds.grads[0] == 1).all())))
    return Target(seeds.keys[0], "all") if whole else target
