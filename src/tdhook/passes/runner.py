"""The runner: what an attribution method runs a model with, in one call of an explained module.

The careful retry: a model that overwrites tensors which the backward pass needs is noticed while it runs. It is then
put back as it was and run again with more care, and so are later calls. :meth:`Runner.carefully` is the only place that
catches what says so.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook.keys import ASIDE
from tdhook.models.entries import plain
from tdhook.models.snapshots import Snapshot
from tdhook.models.state import as_normal, without_backward_hooks
from tdhook.passes.axes import Misread
from tdhook.passes.collected import Collected
from tdhook.passes.forward import Run
from tdhook.passes.heads import NotBehind, NowKnown
from tdhook.passes.overwritten import Overwritten
from tdhook.passes.setup import Setup
from tdhook.passes.within import AsItIs, Learnt, Within
from tdhook.tape.conditions import is_traced
from tdhook.tape.cutting import Graph
from tdhook.tape.functions import copy_of
from tdhook.tape.overwriting import Mutated
from tdhook.tape.undoing import all_of, undone
from tdhook.targets.base import Seeder
from tdhook.targets.through import named_units

__all__ = ["Runner"]

T = TypeVar("T")

_AGAIN = (Learnt, Misread, Mutated, NotBehind, NowKnown)
"""What says that the model is to be run again."""


class Runner:
    """Runs one model for one call.

    Args:
        setup: what is known of the model and of what is asked.
        td: what the explained module was called with: a TensorDict or a tensorclass.
        state: what the method worked out for the model when it started.

    Attributes:
        given: what the explained module was called with.
        td: the same as a TensorDict.
        base: the run on ``td`` as it is: its outputs are what the explained module writes.
        beside: further entries to write, by key.
        overwritten: entries that the model writes to in place.
        graph: what its runs leave on the tape.
        replaced: values of inputs that take the place of those in the batch in every run.
    """

    def __init__(self, setup: Setup, td: TensorDictBase, state: Any = None) -> None:
        self.setup, self.given, self.td, self.state = setup, td, plain(td), state
        self.base: Run | None = None
        self.beside: dict[NestedKey, Tensor] = {}
        self.graph = Graph()
        self.replaced: Mapping[NestedKey, Tensor] = {}
        self._before: Snapshot | None = None
        self._acted = [False]
        """Whether the model has run on the batch as it is: of whatever runs it, that run alone is the call's."""
        self.overwritten = Overwritten(setup.overwritten)

    def on(
        self,
        td: TensorDictBase,
        target: Seeder | None = None,
        state: Any = None,
        replaced: Mapping[NestedKey, Tensor] | None = None,
    ) -> Runner:
        """What runs the model on another batch in the same call, for another target or another method's state.

        Args:
            td: the batch.
            target: what is explained; by default the same.
            state: what the method worked out; by default the same.
            replaced: values of inputs that no entry can hold, as numbers between integers.
        """
        other = copy.copy(self)
        other.replaced = self.replaced if replaced is None else replaced
        other.state = self.state if state is None else state
        if target is not None:
            other.setup = self.setup.asking(target)
        other.td = other.given = td
        other.base, other.beside = None, {}
        return other

    def on_told_units(self, td: TensorDictBase) -> Runner:
        """What explains the same units that an explanation by this one has told to matter most, on the same batch."""
        given = td.copy()
        for key, numbers in self.as_it_is().told.items():
            given.set(key, numbers)
        return self.on(given, named_units(self.setup.question.target))

    def as_it_is(self) -> Run:
        """The run on the batch as it is, which is made if there was none."""
        if self.base is None:
            with self.forward(self.td):
                pass
        assert self.base is not None
        return self.base

    def look_at_axes(self) -> None:
        """See which axes of values inside the model are the batch's, where the method had no backward pass to tell.

        Raises:
            Misread: they are others than they were taken for.
        """
        if is_traced() or not self.as_it_is().is_unsure:
            return
        with torch.enable_grad(), self.forward(self.td) as run:
            everything = run.everything()
            if everything.tensors:
                run.look_at_axes(everything)

    def check(self) -> None:
        """Raise where the model cannot be run on ``td``, as :meth:`forward` does."""
        self.setup.leaves(self.td, {})

    @contextmanager
    def forward(
        self,
        td: TensorDictBase,
        within: Within | None = None,
        *,
        target: Seeder | None = None,
        replaced: Mapping[NestedKey, Tensor] | None = None,
    ) -> Iterator[Run]:
        """Run the model on the tape, and keep it as it was run for the backward passes within.

        Args:
            td: what it is run on, with any batch size; left as it is.
            within: how; by default the model as it is.
            target: what is explained, by default what was asked: it computes its value as a part of the model.
            replaced: values that take the place of attributed ones, by the keys of :meth:`Run.sources`; off the tape
                the model may overwrite them.

        Raises:
            ValueError: the batch is empty, or the model returned another batch size.
        """
        setup, how = self.setup, within or AsItIs()
        given_others, replaced = bool(replaced), {**self.replaced, **(replaced or {})}
        asked = target or self.setup.question.target
        changed = within is not None or bool(replaced)
        is_base = td is self.td and not given_others and self.base is None
        own = is_base and not self._acted[0]
        modules = setup.turn.modules
        prepared = all_of(
            None if own else self.from_the_start(),
            as_normal(modules) if setup.of_inference else None,
            without_backward_hooks(modules),
        )
        with setup.turn, prepared, how.attached():
            work, inputs, integers = setup.leaves(td, replaced)
            self.overwritten.copy(work, setup.in_keys, {*inputs, *integers}, own=own)
            self.graph.grows_from(inputs.values())
            if how.overwrites:
                on_tape = torch.is_grad_enabled()
                for key, value in inputs.items():
                    if key not in integers and (on_tape or key not in replaced):
                        work.set(key, copy_of(value))
            collected = None
            if setup.collects:
                size = tuple(td.batch_size)
                collected = Collected(setup, size, how, replaced, self.graph, changed=changed)

            def forget() -> None:
                how.clear()
                if collected is not None:
                    collected.clear()

            with how.running() if collected is None else collected.within():
                given = work.copy() if asked.writes else work  # what the model writes goes into it
                heads = setup.heads.possible and not how.whole and torch.is_grad_enabled()
                inside = all_of(
                    setup.heads.off_the_tape(how.overwrites) if heads else None,
                    setup.leaves.made(inputs, integers, exact=not replaced) if integers else None,
                )
                with inside:
                    outputs, flat = setup.model.run(self._as_given(work, td), forget)
                if own:
                    self.overwritten.see()
                how.returned(outputs.values(True, True))
                outputs = asked.derive(outputs, given)
            if outputs.batch_size != td.batch_size:
                raise ValueError(
                    f"the model returned a TensorDict of batch size {list(outputs.batch_size)} for one of "
                    f"{list(td.batch_size)}, where its outputs cannot be written; wrap it in a module that moves "
                    "the new axes behind those of the batch"
                )
            run = Run(setup, td, inputs, outputs, flat)
            if collected is not None:
                collected.hand_to(run)
            if is_base:
                self.base, self._acted[0], setup.apart = run, True, setup.model.apart
            yield run

    def _as_given(self, work: TensorDictBase, td: TensorDictBase) -> TensorDictBase:
        """What the model is run on: a tensorclass if the explained module was called with one.

        What is put aside in ``td`` is no business of the model.
        """
        if self.given is self.td:
            aside = ASIDE.intersection(work.keys())
            return work.exclude(*aside) if aside else work
        kind = type(self.given)
        known = set(kind.__expected_keys__)
        return kind.from_tensordict(work.select(*known.intersection(work.keys())))

    def pinned(
        self, run: Run, target: Seeder | None = None, td: TensorDictBase | None = None
    ) -> tuple[Seeder, TensorDictBase]:
        """What is asked, the same of every changed input: the target chooses by a run of the inputs as they are.

        Args:
            run: that run.
            target: what is explained, by default what was asked.
            td: its TensorDict with further entries, if there are any.

        Returns:
            The target that has chosen, and the TensorDict with what it chose.
        """
        target, chosen = run.pinned(target or self.setup.question.target)
        asked = (run.td if td is None else td).copy()
        for key, value in chosen.items():
            asked.set(key, value)
        return target, asked

    def values(self, td: TensorDictBase) -> TensorDictBase:
        """What the model writes and the target computes of it, off the tape."""
        with torch.no_grad(), self.from_the_start():
            work = self.setup.leaves.readable(td)
            self.overwritten.copy(work, self.setup.in_keys, (), own=False)
            given = self._as_given(work, td)
            return self.setup.question.target.derive(self.setup.model.run(given)[0], work)

    @contextmanager
    def from_the_start(self) -> Iterator[None]:
        """Run the model once more, from what it held before the call; afterwards it holds what it holds now."""
        if self._before is None:
            yield
            return
        with undone(self.setup.memory.now().put_back):
            self._before.put_back()
            yield

    def carefully(self, attempt: Callable[[], T]) -> T:
        """Make an attempt, and another where it turns out that the model must be run with more care."""
        setup = self.setup
        while True:
            self.base, self._acted[0] = None, False
            self.beside.clear()
            self.overwritten.clear()
            try:
                if setup.memory.is_empty:
                    self._before = None
                    return attempt()
                with setup.memory.kept(always=False) as self._before:
                    return attempt()
            except _AGAIN:
                continue
            except Exception as error:
                if _covers_up(error):
                    continue
                of_inference = isinstance(error, RuntimeError) and "nference tensor" in str(error)
                if setup.of_inference or not of_inference:
                    raise
                setup.of_inference = True


def _covers_up(error: BaseException) -> bool:
    """Whether an error was raised by what the model does when it is left, such as tensordict's ``to_module``."""
    before = error.__context__
    return before is not None and (isinstance(before, _AGAIN) or _covers_up(before))
