"""Many explanations by one method: of inputs that draws change, brought back, or against references."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook.attribution.apart import look
from tdhook.contexts.attribution import Attribution
from tdhook.contexts.compared import Compared
from tdhook.keys import AGAINST, entry_at, parts_of, put, under
from tdhook.passes.forward import Run
from tdhook.passes.rows import values_of
from tdhook.passes.runner import Runner
from tdhook.passes.variants import Variants
from tdhook.perturbing.draws import Draws, Noise
from tdhook.perturbing.entries import entries_of_references
from tdhook.perturbing.references import References
from tdhook.targets.through import begun_at

__all__ = ["SEVERAL", "against", "explanations", "side_by_side"]

SEVERAL = 8
"""So many references at once take less time than one after the other, which share the run on the batch."""


def against(method: Attribution, over: Draws | References) -> Attribution:
    """The method that explanations are drawn of: where these are against references, it compares with them.

    Raises:
        TypeError: it compares with none.
    """
    if not isinstance(over, References):
        return method
    if not isinstance(method, Compared):
        raise TypeError(
            f"{method!r} compares with no reference: average it over Noise, or give LRP or another"
        )
    return method.against(over)


def explanations(
    method: Attribution, over: Draws | References, runner: Runner, run: Run, *, mean: bool
) -> Iterator[Mapping[NestedKey, Tensor]]:
    """What a method says for each draw, as many at once as fit.

    Args:
        method: as :func:`against` gives it.
        over: the draws, or references with which the method compares.
        runner: runs the model.
        run: the run on the batch as it is.
        mean: whether the mean over draws may be given in place of what it is of.

    Yields:
        ``[draws, *source]`` or ``[draws, outputs, *source]`` by source.
    """
    if not isinstance(over, References):
        changed = _Changed(method, over, runner, run)
        yield from changed.mean() if mean and changed.is_gradient else changed.each()
        return
    assert isinstance(method, Compared) and method.references is not None
    many = side_by_side(method, runner, run) if method.is_one_pass else None
    if many is not None:
        yield from many
        return
    for number in range(method.samples):
        found = method.against(method.references.only(number)).explain(runner.on(run.td), run.td)
        yield {key: x[None] for key, x in found.items()}


def side_by_side(method: Compared, runner: Runner, run: Run) -> Iterator[Mapping[NestedKey, Tensor]] | None:
    """What a method says of the difference from each of its references, as many at once as fit.

    Args:
        method: takes one pass for each reference.
        runner: runs the model.
        run: the run on the batch as it is.

    Returns:
        Gives ``[references, *source]`` or ``[references, outputs, *source]`` by source; ``None`` where they go one
        after the other: few fit at once, what is compared is no entry of the batch, or the method looks across rows.
    """
    assert method.references is not None
    values = run.independent_sources()[0]
    entries = all(key in run.inputs and entry_at(run.td, parts_of(key)) is not None for key in values)
    if runner.replaced or not entries or method.looks_across(runner.state):
        return None
    referred = _Referred(method, method.references, runner, run, values)
    return referred.each() if referred.at_once >= SEVERAL else None


class _Changed:
    """The inputs, changed by draws, and what a method says of them.

    What is chosen is chosen once, on the input as it is, and so is what the method compares with; where an input is
    moved, that is moved with it.
    """

    def __init__(self, method: Attribution, over: Draws, runner: Runner, run: Run) -> None:
        self._over, self._runner, self._run, self._dims = over, runner, run, run.td.batch_dims
        self._inputs = _inputs(run)
        keys = [key for key in self._inputs if key in run.td.keys(True)]
        method, td, fill = method.settled(keys, run.td, each=not over.stays)
        td = fill(td)
        self._variants = Variants(runner, run, td=td, reads=method.reads(td))
        references = {} if over.stays else entries_of_references(td, self._inputs)
        moved = {name: (key, td.get(name)) for name, key in references.items()}
        self._variants.vary({name: x for name, (_, x) in moved.items()})
        self._values = {**{key: (key, x) for key, x in self._inputs.items()}, **moved}
        self._method = method.explaining(self._variants.target)

    @property
    def is_gradient(self) -> bool:
        """Whether the mean may be taken on the way back: the method gives gradients, of inputs that stay in place."""
        return self._method.is_gradient and type(self._over).undone is Noise.undone

    def mean(self) -> Iterator[Mapping[NestedKey, Tensor]]:
        """The mean gradient, as one."""
        each = [1 / self._over.samples] * self._over.samples
        summed = self._variants.summed(each, self._changed, list(self._run.sources()), alike=True)
        yield {key: x[None] for key, x in summed.items()}

    def each(self) -> Iterator[Mapping[NestedKey, Tensor]]:
        """Some of them at a time.

        Raises:
            ValueError: the inputs are moved, and none of them is attributed.
        """
        over, variants, inputs, lost = self._over, self._variants, self._inputs, True
        before = 1 + variants.several + self._dims
        size = math.inf if self._method.looks_across(self._runner.state) else variants.size
        for answer in variants.each(
            over.samples, self._changed, self._ask, size, kind="explanations", alike=True
        ):
            found = {key: x for key, x in answer.found.items() if key in inputs or over.stays}
            lost = lost and not found
            yield {
                key: over.undone(key, x, before, answer.numbers) if key in inputs else x
                for key, x in found.items()
            }
        if lost:
            raise ValueError(
                f"{type(over).__name__} moves the inputs, and what is attributed lies inside the model, where nobody "
                "knows how to move it back: average over Noise, or attribute inputs"
            )

    def _changed(self, numbers: range) -> dict[NestedKey, Tensor]:
        return {
            name: self._over.changed(key, x, self._dims, numbers) for name, (key, x) in self._values.items()
        }

    def _ask(
        self, td: TensorDictBase, entries: Mapping[NestedKey, Tensor]
    ) -> tuple[Tensor, Mapping[NestedKey, Tensor]]:
        given, target = td.copy(), self._variants.target
        for key, x in entries.items():
            value = given.get(key, None)
            if isinstance(value, Tensor) and value.is_floating_point():  # integers stay what they are
                given.set(key, x)
        replaced = {key: x for key, x in entries.items() if key in self._inputs}
        there = self._runner.on(given, target, replaced=replaced)
        found = self._method.explain(there, given)
        base = there.as_it_is()
        return values_of(base.seeds(target), base.outputs.batch_size), found


class _Referred:
    """A batch beside many references, which lie in an entry of it, and what a method says of each difference."""

    def __init__(
        self,
        method: Compared,
        references: References,
        runner: Runner,
        run: Run,
        values: Mapping[NestedKey, Tensor],
    ) -> None:
        self._references, self._runner, self._run, self._values = references, runner, run, values
        self._dims = run.batch_dims(values)
        first = {key: x.squeeze(0) for key, x in self._starts(range(1)).items()}
        td = run.td.copy()
        for key, x in first.items():
            put(td, under(AGAINST, key), x, key)
        self._variants = Variants(runner, run, td=td, reads=[(AGAINST,), *first])
        self._variants.vary({under(AGAINST, key): x for key, x in first.items()})
        self._method = method.against(References(dict.fromkeys(first, (AGAINST,)))).explaining(
            self._variants.target
        )

    @property
    def _size(self) -> int:
        """Bytes of the run on the batch, and of that on the reference."""
        return 2 * self._variants.size

    @property
    def at_once(self) -> int:
        """How many references fit."""
        return self._variants.at_once(self._references.samples, self._size)

    def each(self) -> Iterator[Mapping[NestedKey, Tensor]]:
        """What is found of some of them at a time; models are seen to leave them alone before."""
        start = self._starts(range(1))
        # Whatever units are meant, what passes them is a part of this, which forward passes tell.
        whole = Variants(self._runner, self._run, begun_at(self._runner.setup.question.target))
        look(whole, self._values, {key: start[key].squeeze(0) for key in self._values if key in start})
        count = self._references.samples
        for answer in self._variants.each(count, self._changed, self._ask, self._size, kind="explanations"):
            yield answer.found

    def _starts(self, numbers: range) -> dict[NestedKey, Tensor]:
        return self._references.several(numbers, self._values, self._dims, self._run.td)

    def _changed(self, numbers: range) -> dict[NestedKey, Tensor]:
        return {under(AGAINST, key): x for key, x in self._starts(numbers).items()}

    def _ask(
        self, td: TensorDictBase, entries: Mapping[NestedKey, Tensor]
    ) -> tuple[Tensor, Mapping[NestedKey, Tensor]]:
        given = td.copy()
        for key, x in entries.items():
            given.set(key, x)
        there = self._runner.on(given, self._variants.target)
        found = self._method.explain(there, given)
        base = there.as_it_is()
        return values_of(base.seeds(self._variants.target), base.outputs.batch_size), found


def _inputs(run: Run) -> dict[NestedKey, Tensor]:
    """The inputs, which are changed, detached."""
    if not run.inputs:
        raise ValueError(
            f"there is no input to change: none of those that the model reads "
            f"({', '.join(map(repr, run.setup.model.attributed))}) is floating-point"
        )
    return {key: x.detach() for key, x in run.inputs.items()}
