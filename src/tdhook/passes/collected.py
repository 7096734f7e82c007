"""Collected values: what a forward pass makes inside the model that is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

from tensordict.utils import NestedKey
from torch import Tensor

from tdhook.models.capture import Captured
from tdhook.models.holding import modules_of
from tdhook.passes.forward import Run
from tdhook.passes.performed import Performed
from tdhook.passes.setup import Setup
from tdhook.passes.within import Within
from tdhook.tape.cutting import Graph
from tdhook.tape.undoing import all_of

__all__ = ["Collected"]


class Collected:
    """Outputs of modules, keys and operations of one forward pass.

    Args:
        setup: what is asked for.
        batch: the size of the batch.
        how: the model is run.
        replaced: values that take the place of those that are collected.
        graph: told of these, and of other leaves that are made.
        changed: whether the model is run otherwise than as it is, so that what it does tells nothing of later runs.
    """

    def __init__(
        self,
        setup: Setup,
        batch: tuple[int, ...],
        how: Within,
        replaced: Mapping[NestedKey, Tensor],
        graph: Graph,
        *,
        changed: bool,
    ) -> None:
        self._setup, self._how, self._changed = setup, how, changed
        self._captured = Captured(replaced, graph, partial(setup.axis, batch), how.overwrites)
        self._performed: Performed | None = None
        if setup.inside.operations:
            meant = setup.meant if changed else {}
            others = {
                place: replaced[(repr(place),)] for place in meant.values() if (repr(place),) in replaced
            }
            modules = modules_of(setup.model.root)
            self._performed = Performed(setup.inside.operations, modules, how, meant, others, graph)

    @contextmanager
    def within(self) -> Iterator[None]:
        """Collect while the block runs, around and inside of what is entered for the run."""
        outside = self._setup.collecting(self._captured)
        inside = None if self._performed is None else self._performed.within()
        with all_of(outside, self._how.running(), inside):
            yield

    def clear(self) -> None:
        """Forget all of it: the model runs once more."""
        self._captured.clear()
        if self._performed is not None:
            self._performed.clear()

    def hand_to(self, run: Run) -> None:
        """Give it to the run that it is of."""
        run.modules, run.keys = self._captured.modules, self._captured.keys
        if self._performed is not None:
            run.performed = self._performed.chosen()
            if not self._changed:
                self._setup.meant = run.meant
