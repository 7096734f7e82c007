"""Perturbation: methods that replace features and look at what becomes of the target, by forward passes alone."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeAlias

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook.attribution.apart import Learnt, apart, axes_given, look
from tdhook.attribution.games import Game, Told
from tdhook.attribution.means import Means
from tdhook.contexts.attribution import Shared
from tdhook.contexts.compared import SPREAD, Compared, Complete, compared_with, write_under
from tdhook.extras import require
from tdhook.keys import under
from tdhook.models.model import Model
from tdhook.passes.diagnosis import NOT_FINITE
from tdhook.passes.forward import Run
from tdhook.passes.runner import Runner
from tdhook.passes.variants import Variants
from tdhook.perturbing.players import Grouping, Players, as_numbering
from tdhook.perturbing.references import Baseline, References
from tdhook.tape.conditions import is_traced
from tdhook.targets import TargetLike
from tdhook.targets.base import Seeder

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Played", "PlayedOut", "Playing", "Progress"]

Progress: TypeAlias = "bool | Callable[[int, int], None]"
"""Told how many of how many coalitions are done; ``True`` for a bar on standard error (extra ``cli``)."""


class Playing(Shared, total=False):
    """Keywords of :class:`Played` that methods with keywords of their own hand on."""

    baseline: Baseline | References
    samples: int
    features: Grouping
    batch_dims: int | None
    progress: Progress


class Played(Compared):
    """A method that replaces features by those of a reference, and looks at the target.

    Forward passes alone, as many variants side by side as the memory budget allows. The target chooses once, on the
    inputs as they are. What a feature is worth is split evenly over its entries, so that relevance has the shape of
    what it is of, and sums over a feature are what it is worth.

    Args:
        target: what is explained (:mod:`tdhook.targets`); by default the only output there is.
        baseline: what features are replaced by (:data:`~tdhook.perturbing.references.Baseline`), or
            :class:`~tdhook.perturbing.references.References`; a TensorDict is data to draw from. A key that none is
            given for stays as it is.
        samples: how many references are drawn where the baseline is drawn; relevance is the mean over them.
        features: what is replaced together (:data:`~tdhook.perturbing.players.Grouping`); by default each entry alone.
        batch_dims: how many leading axes of the batch tell elements apart. By default as many as do: where elements
            are seen to depend on each other, as the steps of a recurrent policy, each place along that axis has
            features of its own, and the target is summed along it.
        progress: told how far it is (:data:`Progress`).
        **options: those of :class:`~tdhook.contexts.attribution.Attribution`: ``attribute``, ``input_modules``, ...
    """

    def __init__(
        self,
        target: TargetLike = None,
        *,
        baseline: Baseline | References = 0.0,
        samples: int = 1,
        features: Grouping = None,
        batch_dims: int | None = None,
        progress: Progress = False,
        **options: Unpack[Shared],
    ) -> None:
        super().__init__(target, **options)
        self.references = compared_with(baseline, samples)
        self.features, self.batch_dims, self.progress = as_numbering(features), batch_dims, progress
        if progress and self.compile is not None:
            raise ValueError("a graph tells nobody how far it is: leave out progress, or compile")

    def start(self, model: Model) -> Learnt:
        """What is found out of the model."""
        return Learnt()

    def learnt(self, state: Learnt) -> str:
        """Along which axes elements depend on each other."""
        return f"together {state.together}"

    @abstractmethod
    def play(self, game: Game) -> Tensor:
        """What each feature is worth, ``[rows, features]``; or ``[outputs, rows, features]``."""

    def explain(self, runner: Runner, td: TensorDictBase) -> Mapping[NestedKey, Tensor]:
        """One forward pass to choose, then those of the variants."""
        found: dict[NestedKey, Tensor] = {}
        with runner.forward(td) as run, _telling(self.progress) as told:
            variants = Variants(runner, run, target=self.wanted(run))
            for ends in run.independent_sources():
                means, games = Means(self.spreads), []
                for number in range(self.samples):
                    start = self.reference(run, ends, number)
                    game = self.game(runner, run, variants, ends, start, told)
                    self.begin(game, run)
                    means.add(game.by_source(self.play(game)))
                    games.append(game)
                found.update(means.mean)
                self.note(runner, run, games, means)
        return found

    def wanted(self, run: Run) -> Seeder:
        """What the variants are asked about."""
        return self.seeder

    def game(
        self,
        runner: Runner,
        run: Run,
        variants: Variants,
        ends: Mapping[NestedKey, Tensor],
        start: Mapping[NestedKey, Tensor],
        told: Told | None = None,
    ) -> Game:
        """The game against one reference."""
        learnt: Learnt = runner.state
        if not start:
            raise ValueError(
                f"the baseline names none of {', '.join(map(repr, map(under, ends)))}, so that nothing there would be "
                "replaced: give a baseline for one of them, or do not attribute them"
            )
        axes, values = axes_given(run.td, self.batch_dims, self.seeder), None
        if self.batch_dims is None:
            try:
                axes, values = apart(variants, ends, start, axes, learnt)
            except ValueError as error:
                if NOT_FINITE not in str(error):
                    raise
                raise ValueError(
                    f"{error}. It is so where elements of the batch are the baseline, by which it is seen whether they "
                    "depend on each other: give a baseline on which the target is finite; or say which axes tell "
                    f"elements apart, batch_dims={run.td.batch_dims} if all do, to a method that asks of no element "
                    "that is all baseline"
                ) from error
        elif run.td.batch_dims and 0 not in axes:
            variants.meeting = True
            if not is_traced():
                look(variants, ends, start)
        return Game(variants, ends, start, axes, self.players(learnt), told, values)

    def begin(self, game: Game, run: Run) -> None:
        """See what else there is to the run on the batch as it is, before the game is played."""

    def players(self, learnt: Learnt) -> Callable[[Mapping[NestedKey, Tensor], int], Players]:
        """What gives the features of values."""
        return lambda values, others: Players.of(values, others, self.features, learnt.known)

    def note(self, runner: Runner, run: Run, games: Sequence[Game], means: Means) -> None:
        """Write what is written besides."""
        write_under(SPREAD, runner, run, means.deviations())


class PlayedOut(Played, Complete):
    """A method whose relevance adds up to the difference of the target from the reference.

    Args:
        target: what is explained (:mod:`tdhook.targets`); by default the only output there is.
        ledger: whether to account for it (:class:`~tdhook.contexts.compared.Complete`).
        **options: those of :class:`Played`: ``baseline``, ``features``, ...
    """

    def __init__(
        self, target: TargetLike = None, *, ledger: bool = False, **options: Unpack[Playing]
    ) -> None:
        Played.__init__(self, target, **options)
        self.ledger = ledger

    def note(self, runner: Runner, run: Run, games: Sequence[Game], means: Means) -> None:
        """Write the accounts, and the spread."""
        rises = None
        if self.ledger:
            rises = torch.stack([game.rise for game in games])
        meeting = {axis for game in games for axis in game.meeting}
        self.told(runner, run, means.mean, rises, means.deviations(), sorted(meeting))


@contextmanager
def _telling(progress: Progress) -> Iterator[Told | None]:
    """Who is told how far it is."""
    if progress is False:
        yield None
    elif progress is not True:
        yield progress
    else:
        with require("rich.progress", "progress=True").Progress(transient=True) as bar:
            task = bar.add_task("variants")
            yield lambda done, total: bar.update(task, completed=done, total=total)
