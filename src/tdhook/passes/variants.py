"""Variants: a batch with other values in it, many times over, as many side by side as memory allows.

Methods that ask a model again and again (paths, noise, perturbations) ask here. Variants are laid out as elements of
one larger batch. That is right where elements of a batch have nothing to do with each other, which is looked at in each
call: among the first variants lies the batch as it is, and the model must answer there what it answered before. And
some of the others must have the answers that they have alone, since the largest of a batch, say, is the same whatever
smaller values lie beside the batch as it is. It is looked at again where there are as many at once as there were not
yet.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook.keys import under
from tdhook.passes.backward import sizes_behind
from tdhook.passes.beside import Answer, Ask, Change, beside, parted, without
from tdhook.passes.forward import Run
from tdhook.passes.rows import is_close, some_rows, values_of
from tdhook.passes.runner import Runner
from tdhook.passes.setup import LAYOUTS
from tdhook.passes.summing import Summing
from tdhook.passes.telling import telling
from tdhook.tape.conditions import holds
from tdhook.targets.base import Seeder

__all__ = ["REACHED", "Variants"]

REACHED = "reached"
"""Where the values of sources are told beside their gradients."""


# Bytes of values that variants may take together. More does not fit the caches of a CPU, and takes longer.
_BUDGET = {"cpu": 2**24}
_BUDGET_ELSEWHERE = 2**31
# Bytes of variants that are copied to look at whether they leave each other alone, or two of them.
_COPIED = 2**20


class Variants:
    """Asks a model the same of many variants of a batch: what was chosen on the batch as it is stays chosen.

    Args:
        runner: runs the model.
        run: the run on the batch as it is.
        target: what is explained, by default what was asked; only of what the run has written.
        td: the batch, where it has entries that the run did not need.
        reads: entries that are needed besides what the model and the target read.

    Attributes:
        target: what is explained, with its choice made.
        values: what is explained of each element of the batch as it is, ``[*batch]`` or ``[outputs, *batch]``.
        batch: the batch size.
        meeting: whether elements depend on each other along the first axis of the batch, as far as is known: then
            variants would, too, if they were further rows of it.
    """

    def __init__(
        self,
        runner: Runner,
        run: Run,
        target: Seeder | None = None,
        td: TensorDictBase | None = None,
        reads: Iterable[NestedKey] = (),
    ) -> None:
        self._runner, self._setup = runner, runner.setup
        wanted = runner.setup.question.target if target is None else target
        self.target, asked = runner.pinned(run, wanted, td)
        self._asked = _needed(runner, self.target, asked, reads)
        self._run = run
        self._sources = {key: x.detach() for key, x in {**run.inputs, **run.sources()}.items()}
        self._leads = run.batch_dims(self._sources)
        self._inputs = set(run.inputs)
        self._unread: set[NestedKey] = set()
        self._held = runner.replaced
        self._seeds = seeds = run.seeds(wanted)
        run.look_at_axes(seeds)
        self.values = values_of(seeds, run.outputs.batch_size)
        self.batch: torch.Size = run.outputs.batch_size
        self.meeting = False
        self._looked: dict[str, set[int]] = {}
        self._shapes = {key: x.shape for key, x in self._sources.items()}
        self._besides = {under(REACHED, key): x.shape for key, x in self._sources.items()}
        sizes = list(sizes_behind(seeds.tensors))
        self._largest, self._total = max(sizes, default=0), sum(sizes)
        given = sum(x.numel() * x.element_size() for x in self._sources.values())
        self._few = max(2, _COPIED // max(1, given))

    def vary(self, entries: Mapping[NestedKey, Tensor]) -> None:
        """Let changes take in entries of the batch that the model does not read, ``[*batch, *shape]``."""
        self._sources.update(entries)
        self._leads.update(dict.fromkeys(entries, self._asked.batch_dims))
        self._inputs.update(entries)
        self._unread.update(entries)

    @property
    def size(self) -> int:
        """Bytes that one variant takes while it is run forwards and backwards."""
        return self._total + 4 * self._largest

    @property
    def looked_at(self) -> int:
        """How many variants are looked at whether they leave each other alone, at most."""
        return self._few

    @property
    def several(self) -> int:
        """How many axes ``values`` has before those of the batch: one where several outputs are explained."""
        axes: int = self._asked.batch_dims
        return self.values.dim() - axes

    def answers(self, count: int, change: Change) -> Iterator[Answer]:
        """The values of so many variants, some at a time, by forward passes alone."""
        with torch.no_grad():
            # Nothing is kept for a way back: what lies in the nearer caches is quicker, if the user does not say.
            share = 8 if self._setup.question.memory_budget is None else 2
            yield from self.each(count, change, self._value, share * self._largest, kind="values")

    def gradients(
        self, count: int, change: Change, of: Iterable[NestedKey] | None = None, *, reached: bool = False
    ) -> Iterator[Answer]:
        """The values of so many variants, some at a time, and their gradients by source.

        Args:
            count: how many variants there are.
            change: makes them.
            of: the sources whose gradients are wanted, or inputs; by default those that are changed.
            reached: whether the values of these are wanted too, under ``(REACHED, key)``.
        """
        ask = partial(self._gradient, of=of, reached=reached)
        yield from self.each(count, change, ask, self.size, kind="gradients")

    def summed(
        self,
        weights: Sequence[float],
        change: Change,
        of: Iterable[NestedKey],
        *,
        alike: bool = False,
    ) -> dict[NestedKey, Tensor]:
        """A weighted sum of the gradients of variants, by source ``[*source]`` or ``[outputs, *source]``.

        Args:
            weights: one for each variant.
            change: makes them.
            of: the sources whose gradients are wanted.
            alike: as :meth:`each` takes it.
        """
        found = None
        for directly in (False, True):  # a backward pass that goes all the way says best what is not finite
            summing = Summing(self._run, self._seeds, len(weights), of, directly=directly)
            self._shapes.update(summing.shapes)
            ask = partial(self._to_be_summed, summing)
            for answer in self.each(len(weights), change, ask, self.size, kind="gradients", alike=alike):
                summing.add(answer.found, weights[answer.numbers.start : answer.numbers.stop])
            found = summing.total()
            if found is not None:
                break
        assert found is not None
        return found

    def each(
        self, count: int, change: Change, ask: Ask, size: float, *, kind: str, alike: bool = False
    ) -> Iterator[Answer]:
        """What is found of so many variants, some at a time.

        Args:
            count: how many variants there are.
            change: makes them.
            ask: what is found of a batch.
            size: bytes that one variant takes meanwhile; infinite for one after the other.
            kind: of what is asked: once for each it is looked at whether variants leave each other alone.
            alike: whether variants are so like the batch as it is that a mean over them, or a variance, is the same:
                another one, of half its values, is looked at beside them.
        """
        at_once, apart = self.at_once(count, size), False
        start = 0
        while start < count:
            alone = at_once == 1 or self._setup.layout == LAYOUTS[-1]
            numbers = range(start, start + 1 if alone else min(start + at_once, count))
            looks = not alone and self._is_to_be_looked_at(kind, len(numbers))
            if looks and len(numbers) > self._few:  # where one looks, all is copied once more
                numbers = range(start, start + self._few)
            try:
                if alone:
                    changed = {key: value[0] for key, value in change(numbers).items()}
                    values, found = ask(self._asked, changed)
                    one = {key: value.unsqueeze(0) for key, value in found.items()}
                    answer = Answer(numbers, values.unsqueeze(0), one)
                else:
                    together = self._together(numbers, change, ask, looks=looks, alike=alike)
                    if together is None:
                        at_once, apart = 1, True
                        continue
                    answer = together
                    self._looked.setdefault(kind, set()).add(len(numbers))
            except torch.OutOfMemoryError:  # too many for the moment: fewer, in this call alone
                if alone:
                    raise
                at_once = (at_once + 1) // 2
                continue
            if apart:
                self._setup.layout = LAYOUTS[-1]
            yield answer
            start = numbers.stop

    def _is_to_be_looked_at(self, kind: str, count: int) -> bool:
        """Whether it is still to be seen that so many variants leave each other alone."""
        looked = self._looked.get(kind, set())
        return count not in looked if count <= self._few else not looked

    def at_once(self, count: int, size: float) -> int:
        """How many of so many variants fit at once, each of which takes so many bytes."""
        budget = self._setup.question.memory_budget
        if budget is None:
            budget = _BUDGET.get(self.values.device.type, _BUDGET_ELSEWHERE)
        # By comparison alone: where a graph is traced for any batch size it then holds for a range of them.
        at_once = 1
        while at_once < count and 2 * at_once * size <= budget:
            at_once *= 2
        return min(at_once, count)

    def _together(
        self, numbers: range, change: Change, ask: Ask, *, looks: bool, alike: bool
    ) -> Answer | None:
        """What is found of some variants side by side, in the first layout in which they leave each other alone.

        ``None`` where they do in none. They are made anew for each layout, since a model may overwrite what it is
        given.
        """
        changed = change(numbers)
        inner = self._asked.batch_dims > 0 and not changed.keys() <= self._inputs
        for layout in LAYOUTS[LAYOUTS.index(self._setup.layout) : -1]:
            if (layout == "axis" and inner) or (layout == "rows" and self.meeting):
                continue  # whether modules then see a flat batch is not known; rows are elements of it
            try:
                changed = changed or change(numbers)
                answer = self._laid_out(layout, numbers, changed, ask, looks=looks, alike=alike)
            except torch.OutOfMemoryError:
                raise
            except Exception:  # one after the other it is raised again, where it is not of the layout
                answer = None
            if answer is not None:
                self._setup.layout = layout
                return answer
            changed = {}
        return None

    def _laid_out(
        self,
        layout: str,
        numbers: range,
        changed: Mapping[NestedKey, Tensor],
        ask: Ask,
        *,
        looks: bool,
        alike: bool,
    ) -> Answer | None:
        """What is found in one layout; ``None`` where variants have to do with each other in it."""
        copies, middle, variants = len(numbers), len(numbers) // 2, changed
        if looks:
            copies += 1 + alike
            changed = {key: self._with(value, key, middle, alike) for key, value in variants.items()}
        rows = layout == "rows"
        replaced = {
            key: value.flatten(0, 1) if self._leads[key] and (rows or key not in self._inputs) else value
            for key, value in changed.items()
        }
        values, found = ask(beside(self._asked, copies, replaced, self._inputs, rows=rows), replaced)
        several = values.dim() > self._asked.batch_dims + (not rows or not self._asked.batch_dims)
        values = parted(values, copies, self._asked.batch_size, several)
        apart = {key: parted(value, copies, *self._shape(key, several)) for key, value in found.items()}
        if not looks:
            return Answer(numbers, values, apart)
        if not holds(is_close(values[middle], self.values)):
            return None
        values = without(values, middle, len(numbers))
        if not self._as_alone(variants, values):
            return None
        return Answer(
            numbers, values, {key: without(value, middle, len(numbers)) for key, value in apart.items()}
        )

    def _as_alone(self, changed: Mapping[NestedKey, Tensor], values: Tensor) -> bool:
        """Whether the variants that tell most have the values that they have alone.

        Where nothing that the model reads has changed, they all have the same.
        """
        if changed.keys() <= self._unread:
            return True
        for number in telling(changed, self._sources, values.dtype).split(1):
            chosen = {key: value.index_select(0, number).squeeze(0) for key, value in changed.items()}
            with torch.no_grad():
                alone, _ = self._value(self._asked, chosen)
            if not holds(is_close(values.index_select(0, number).squeeze(0), alone)):
                return False
        return True

    def _with(self, value: Tensor, key: NestedKey, middle: int, alike: bool) -> Tensor:
        """Variants of a source, the batch as it is among them, and after them one that is like none, if so."""
        there = self._sources[key].unsqueeze(0)
        return torch.cat([value[:middle], there, value[middle:], *([0.5 * there] if alike else [])])

    def _shape(self, key: NestedKey, several: bool) -> tuple[torch.Size, bool]:
        """The shape of what is found of a source, and whether there is one for each output."""
        shape = self._shapes.get(key)
        return (self._besides[key], False) if shape is None else (shape, several)

    def among(self, rows: Tensor) -> Variants | None:
        """The same of some elements along the first batch axis; ``None`` where they have to do with each other."""
        if self._setup.layout != LAYOUTS[0] or not self._asked.batch_dims:
            return None
        some, count = object.__new__(Variants), self._asked.batch_size[0]
        some.__dict__.update(self.__dict__)
        some._asked, some._looked = self._asked[rows], {}
        some._held = {key: x.index_select(0, rows) for key, x in self._held.items()}
        some.batch = some._asked.batch_size
        some.values = self.values.index_select(self.several, rows)
        with some._forward(some._asked, {}) as some._run:
            some._seeds = some._run.seeds(self.target)
        if not holds(is_close(values_of(some._seeds, some.batch), some.values)):
            return None
        some._sources = {key: some_rows(x, count, rows) for key, x in self._sources.items()}
        some._shapes = {key: x.shape for key, x in some._sources.items()}
        some._besides = {under(REACHED, key): shape for key, shape in some._shapes.items()}
        share = len(rows) / count
        some._largest, some._total = math.ceil(self._largest * share), math.ceil(self._total * share)
        return some

    def _forward(
        self, td: TensorDictBase, replaced: Mapping[NestedKey, Tensor]
    ) -> AbstractContextManager[Run]:
        """The model on variants; inputs that no entry holds stay those of the batch as it is, as often as that."""
        held, batch = {key: x for key, x in self._held.items() if key not in replaced}, self._asked.batch_size
        if held and td.batch_size != batch:
            copies, rows = td.batch_size.numel() // batch.numel(), len(td.batch_size) == len(batch)
            beside = {key: x.expand(copies, *x.shape) for key, x in held.items()}
            held = {key: x.flatten(0, 1) if rows else x for key, x in beside.items()}
        return self._runner.forward(td, target=self.target, replaced={**held, **replaced})

    def _value(
        self, td: TensorDictBase, replaced: Mapping[NestedKey, Tensor]
    ) -> tuple[Tensor, dict[NestedKey, Tensor]]:
        with self._forward(td, replaced) as run:
            return values_of(run.seeds(self.target), run.outputs.batch_size), {}

    def _to_be_summed(
        self, summing: Summing, td: TensorDictBase, replaced: Mapping[NestedKey, Tensor]
    ) -> tuple[Tensor, dict[NestedKey, Tensor]]:
        copies = td.batch_size.numel() // self._asked.batch_size.numel()
        with self._forward(td, replaced) as run:
            seeds = run.seeds(self.target)
            return values_of(seeds, run.outputs.batch_size), summing.pulled(run, seeds, copies)

    def _gradient(
        self,
        td: TensorDictBase,
        replaced: Mapping[NestedKey, Tensor],
        *,
        of: Iterable[NestedKey] | None,
        reached: bool,
    ) -> tuple[Tensor, dict[NestedKey, Tensor]]:
        with self._forward(td, replaced) as run:
            seeds, sources = run.seeds(self.target), run.sources(replaced if of is None else of)
            if of is not None:
                sources = {**{key: run.inputs[key] for key in of if key in run.inputs}, **sources}
            pulled = run.pull(seeds, sources)
            if reached:
                pulled.update({under(REACHED, key): x.detach() for key, x in sources.items()})
            return values_of(seeds, run.outputs.batch_size), pulled


def _needed(runner: Runner, target: Seeder, td: TensorDictBase, reads: Iterable[NestedKey]) -> TensorDictBase:
    """Those entries of a batch that the answer depends on."""
    entries, model = target.entries, runner.setup.model
    if entries is None:
        return td
    keys = [*runner.setup.in_keys, *model.beside(td), *entries, *reads]
    return td.select(*dict.fromkeys(keys), strict=False)
