"""SARFA: spots that speak for one action and not for the others."""

from __future__ import annotations

import torch
from torch import Tensor

from tdhook.attribution.games import Game
from tdhook.attribution.spotted import Spotted, every_output
from tdhook.passes.forward import Run
from tdhook.tape.conditions import holds
from tdhook.targets.base import Seeder

__all__ = ["SARFA"]


class SARFA(Spotted):
    """Where a blurred spot takes probability from an action, and leaves the others among each other (Puri et al. 2020).

    The target names the action among the values of all, ``SARFA(Target("action_value", "argmax"))``. Equations 4 to 7:
    how much a softmax over the values loses for the action, in the harmonic mean with ``1 / (1 + KL)`` of the softmax
    over the other actions; zero where the action loses nothing. What a pixel has is split evenly over its channels.

    Args:
        target: an action among the values of all.
        **options: those of :class:`~tdhook.attribution.spotted.Spotted`: ``distance``, ``width``, ``baseline``, ...

    Raises:
        ValueError: the target does not name one action of several.
    """

    def wanted(self, run: Run) -> Seeder:
        """The values of all actions."""
        return every_output(self.seeder, run, always=True)

    def begin(self, game: Game, run: Run) -> None:
        """Which action is explained, and which are masked."""
        seeds = run.seeds(self.seeder)
        weight = seeds.grads[0]
        alone = len(seeds.keys) == 1 and seeds.several is None and weight.dim() == run.outputs.batch_dims + 1
        if not alone or weight.shape[-1] < 2:
            raise ValueError(_ONE)
        chosen = game.by_element(weight.movedim(-1, 0))
        # Padding, of which nothing is explained, has no action.
        if not holds((chosen == 0) | (chosen == 1)) or not holds(chosen.sum(0) <= 1):
            raise ValueError(
                _ONE if not game.meeting else _EACH.format(list(run.td.batch_size), game.meeting[0])
            )
        masked = (seeds.tensors[0].detach() == -torch.inf).to(weight).movedim(-1, 0)
        game.notes.update(chosen=chosen == 1, masked=game.by_element(masked) > 0)

    def play(self, game: Game) -> Tensor:
        """One variant for each spot."""
        chosen, masked = game.notes["chosen"], game.notes["masked"]

        def shares(values: Tensor) -> tuple[Tensor, Tensor]:
            values = values.masked_fill(masked, -torch.inf)
            whole = torch.where(chosen, values.softmax(-2), 0.0).sum(-2)
            return whole, values.masked_fill(chosen, -torch.inf).log_softmax(-2)

        before, others = shares(game.full)

        def score(worth: Tensor) -> Tensor:
            after, changed = shares(worth)
            ratio = torch.where(changed > -torch.inf, changed - others, 0.0)
            alike = 1 / (1 + (changed.exp() * ratio).sum(-2))
            lost = (before - after).clamp(min=0)
            return 2 * alike * lost / (alike + lost)

        return self.spotted(game, score)


_ONE = (
    "SARFA explains one action among the values of at least two: Target(key, 'argmax'), Target(key, 'action'), or "
    "Target(key, number)"
)
_EACH = (
    "elements of the batch {} depend on each other along its axis {}, and each has an action of its own, where SARFA "
    "explains one: name the step, AtStep(target), or explain elements one by one"
)
