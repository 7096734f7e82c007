"""Occlusion: what the target loses where a window covers a part of the input."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

import torch
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor

from tdhook.attribution.games import Game
from tdhook.attribution.played import Played, Playing
from tdhook.keys import under
from tdhook.perturbing.windows import Window, Windows
from tdhook.targets import TargetLike

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Occlusion"]


class Occlusion(Played):
    """``f(x) - f(x with a window replaced)``, for windows that slide over the input (Zeiler and Fergus 2014).

    What a window is worth is split evenly over its entries; an entry has the mean over the windows that cover it.

    Args:
        target: what is explained (:mod:`tdhook.targets`); by default the only output there is.
        window: its size along the last axes, ``(8, 8)`` for pictures: along those before, as channels, it takes in all.
            Or by key.
        strides: how far apart windows are, one for all axes or one for each; by default they lie side by side.
        **options: those of :class:`~tdhook.attribution.played.Played` but ``features``: ``baseline``, ...

    Raises:
        ValueError: features are given, the window does not fit, or strides leave gaps.
        KeyError: there is no window for what is attributed.
    """

    def __init__(
        self,
        target: TargetLike = None,
        *,
        window: Window | Mapping[NestedKey, Window],
        strides: Window | None = None,
        **options: Unpack[Playing],
    ) -> None:
        super().__init__(target, **options)
        if self.features is not None:
            raise ValueError("Occlusion has windows for features; Ablation takes features=")
        self.window, self.strides = window, strides

    def play(self, game: Game) -> Tensor:
        """One variant for each window."""
        found = []
        for key in game.keys:
            shape = game.value(key).shape[1:]
            windows = Windows.of(shape[game.others :], self._window(key), self.strides, under(key))
            windows = windows.at_each_place_of(shape[: game.others])
            worth = game.worth_of(windows.grid.numel(), partial(_without, key, windows))
            found.append(windows.spread_out((game.full - worth).movedim(0, -1)))
        return torch.cat(found, -1)

    def _window(self, key: NestedKey) -> Window:
        if not isinstance(self.window, Mapping):
            return self.window
        named = {unravel_key(name): window for name, window in self.window.items()}
        if under(key) not in named:
            raise KeyError(f"windows are given by key, and {under(key)!r} has none")
        return named[under(key)]


def _without(key: NestedKey, windows: Windows, numbers: range) -> dict[NestedKey, Tensor]:
    return {key: ~windows.masks(numbers)}
