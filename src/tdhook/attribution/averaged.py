"""Averaged: any method, over noise, references, or transforms that can be undone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook.attribution.means import Means
from tdhook.contexts.attribution import Attribution
from tdhook.contexts.compared import ERROR, SPREAD, Compared, write_under
from tdhook.models.model import Model
from tdhook.passes.forward import Run
from tdhook.passes.rows import values_of
from tdhook.passes.runner import Runner
from tdhook.passes.variants import Variants
from tdhook.perturbing.draws import Draws, Noise
from tdhook.perturbing.references import Fill, References, entries_of_references
from tdhook.targets import TargetLike
from tdhook.targets.through import tells_units

__all__ = ["Averaged"]


class Averaged(Attribution):
    """A method, averaged: over noise, SmoothGrad (Smilkov et al. 2017); over references; over flips and shifts.

    What is chosen (``"argmax"``, an action) is chosen once, on the input as it is, and so is what the method compares
    with. Where an input is moved, that is moved with it; and relevance of values inside the model is left out, as
    nobody knows how to move it back.

    Args:
        method: any method, :class:`~tdhook.attribution.lrp.LRP` and those around others included; what is explained
            and attributed is what it says.
        over: what is averaged over: :class:`~tdhook.perturbing.draws.Noise`, ``Flips``, ``Shifts``, or what has their
            methods; or :class:`~tdhook.perturbing.references.References`, for a method that compares with one.
        of: what is written: the ``"mean"`` of relevance, that of its ``"squares"`` (SmoothGrad squared, Hooker et al.
            2019), or its ``"variance"`` (VarGrad, Adebayo et al. 2018).
        spread: whether its standard deviation is written too, under ``("spread", key)``, and the standard error of the
            mean under ``("standard_error", key)``, of the shape of the relevance of ``key``.

    Raises:
        TypeError: there are references to be averaged over, and the method compares with none.
        ValueError: the method writes more than relevance (a ledger), which nobody averages; there is no spread of one.
    """

    def __init__(
        self,
        method: Attribution,
        over: Draws | References,
        *,
        of: Literal["mean", "squares", "variance"] = "mean",
        spread: bool = False,
    ) -> None:
        if of not in ("mean", "squares", "variance"):
            raise ValueError(f"of is 'mean', 'squares' or 'variance', got {of!r}")
        if isinstance(over, References) and not isinstance(method, Compared):
            raise TypeError(
                f"{method!r} compares with no reference: average it over Noise, or give LRP or another"
            )
        if method.writes or method.writes_under:
            besides = ", ".join(map(repr, [*method.writes, *method.writes_under]))
            raise ValueError(
                f"{method!r} writes {besides} besides relevance, which would be that of one of many: leave out ledger, "
                "errors, and the values and spread of References; of interactions there is no mean"
            )
        if over.samples < 2 and (spread or of == "variance"):
            raise ValueError("one explanation has no spread: draw several, by samples")
        super().__init__(**method.shared)
        self.method, self.over, self.of, self.spread = method, over, of, spread

    def __repr__(self) -> str:
        return f"Averaged({self.method!r}, over={self.over!r})"

    @property
    def changes_inputs(self) -> bool:
        """All inputs are."""
        return True

    def explain(self, runner: Runner, td: TensorDictBase) -> Mapping[NestedKey, Tensor]:
        """One forward pass to choose, then what the method does for each draw, as many at once as fit.

        Which units matter most is said by the method, on the input as it is, before all else.
        """
        if tells_units(runner.setup.question.target):
            there = runner.on(td)
            self.method.explain(there, td)
            named = there.on_told_units(td)
            found = self.explaining(named.setup.question.target).explain(named, named.td)
            runner.base = there.base
            runner.beside.update(named.beside)
            return found
        means = Means(self.spread or self.of == "variance")
        with runner.forward(td) as run:
            if isinstance(self.over, References):
                for number in range(self.over.samples):
                    method = self._of_reference(number)
                    self._add(means, {key: x[None] for key, x in method.explain(runner.on(td), td).items()})
            else:
                self._draw(means, runner, run)
            deviations = means.deviations()
            if self.spread:
                root = self.over.samples**0.5
                write_under(SPREAD, runner, run, deviations)
                write_under(ERROR, runner, run, {key: value / root for key, value in deviations.items()})
        return {key: x.square() for key, x in deviations.items()} if self.of == "variance" else means.mean

    def _add(self, means: Means, found: Mapping[NestedKey, Tensor]) -> None:
        """Add explanations, ``[draws, *source]`` or ``[draws, outputs, *source]`` by source."""
        count = len(next(iter(found.values()))) if found else 0
        means.add_all({key: x.square() for key, x in found.items()} if self.of == "squares" else found, count)

    def _draw(self, means: Means, runner: Runner, run: Run) -> None:
        over = self.over
        assert not isinstance(over, References)
        inputs, dims = _inputs(run), run.td.batch_dims
        keys = [key for key in inputs if key in run.td.keys(True)]
        method, td, fill = self.method.settled(keys, run.td, each=not over.stays)
        td = fill(td)
        variants = Variants(runner, run, td=td, reads=method.reads(td))
        references = {} if over.stays else entries_of_references(td, inputs)
        moved = {name: (key, td.get(name)) for name, key in references.items()}
        variants.vary({name: x for name, (_, x) in moved.items()})
        method = method.explaining(variants.target)

        def changed(numbers: range) -> dict[NestedKey, Tensor]:
            each = {**{key: (key, x) for key, x in inputs.items()}, **moved}
            return {name: over.changed(key, x, dims, numbers) for name, (key, x) in each.items()}

        def ask(
            td: TensorDictBase, entries: Mapping[NestedKey, Tensor]
        ) -> tuple[Tensor, Mapping[NestedKey, Tensor]]:
            given = td.copy()
            for key, x in entries.items():
                value = given.get(key, None)
                if isinstance(value, Tensor) and value.is_floating_point():  # integers stay what they are
                    given.set(key, x)
            replaced = {key: x for key, x in entries.items() if key in inputs}
            there = runner.on(given, variants.target, replaced=replaced)
            found = method.explain(there, given)
            base = there.as_it_is()
            return values_of(base.seeds(variants.target), base.outputs.batch_size), found

        moves_nothing = type(over).undone is Noise.undone
        if method.is_gradient and self.of == "mean" and not self.spread and moves_nothing:
            each = [1 / over.samples] * over.samples
            means.add(variants.summed(each, changed, list(run.sources()), alike=True))
            return
        for answer in variants.each(
            over.samples, changed, ask, variants.size, kind="explanations", alike=True
        ):
            before = 1 + variants.several + dims
            self._add(
                means,
                {
                    key: over.undone(key, x, before, answer.numbers) if key in inputs else x
                    for key, x in answer.found.items()
                    if key in inputs or over.stays
                },
            )
        if not means.mean:
            raise ValueError(
                f"{type(over).__name__} moves the inputs, and what is attributed lies inside the model, where nobody "
                "knows how to move it back: average over Noise, or attribute inputs"
            )

    def _of_reference(self, number: int) -> Attribution:
        """The method, with one of the references."""
        assert isinstance(self.over, References) and isinstance(self.method, Compared)
        return self.method.against(self.over.only(number))

    def _around(self, method: Attribution, over: Draws | References) -> Averaged:
        other = copy.copy(self)
        other.target, other.seeder, other.method, other.over = method.target, method.seeder, method, over
        return other

    @property
    def compares(self) -> bool:
        """Whether the method does."""
        return self.method.compares

    def asked(self, **shared: Any) -> Averaged:
        """The same, with other options of those that all methods take."""
        return Averaged(self.method.asked(**shared), self.over, of=self.of, spread=self.spread)

    def explaining(self, target: TargetLike) -> Averaged:
        """The same for another target."""
        return self._around(self.method.explaining(target), self.over)

    def among(self, td: TensorDictBase) -> Averaged:
        """With means and samples of ``td``, unless the references have data of their own."""
        over = self.over
        return self._around(self.method.among(td), over.among(td) if isinstance(over, References) else over)

    def drawn_from(self, rows: Callable[[], TensorDictBase]) -> Averaged:
        """With means and samples of these rows, unless the references have data of their own."""
        over = self.over
        return self._around(
            self.method.drawn_from(rows), over.drawn_from(rows) if isinstance(over, References) else over
        )

    @property
    def steps_before(self) -> int:
        """As many as the method looks at, or the references."""
        ours = self.over.steps_before if isinstance(self.over, References) else 0
        return max(ours, self.method.steps_before)

    def settled(
        self,
        keys: Sequence[NestedKey],
        td: TensorDictBase,
        valid: Tensor | None = None,
        *,
        each: bool = False,
        first: int = 0,
    ) -> tuple[Averaged, TensorDictBase, Fill]:
        """With references that are entries, where they are means, draws, or the step before."""
        if isinstance(self.over, References):
            over, td, fill = self.over.settled(keys, td, valid, each=each, first=first)
            return self._around(self.method, over), td, fill
        method, td, fill = self.method.settled(keys, td, valid, each=each, first=first)
        return self._around(method, self.over), td, fill

    def start(self, model: Model) -> Any:
        """What the method works out."""
        return self.method.start(model)

    @property
    def writes_under(self) -> tuple[str, ...]:
        """``"spread"`` and ``"standard_error"``, if they were asked for."""
        return (SPREAD, ERROR) if self.spread else ()

    def reads(self, td: TensorDictBase) -> list[NestedKey]:
        """What the method reads, and the references are taken of."""
        return [*self.method.reads(td), *(self.over.reads(td) if isinstance(self.over, References) else ())]

    def reads_signs(self, state: Any) -> bool:
        """Noise may take away that no input is negative."""
        return False

    def learnt(self, state: Any) -> str:
        """What the method has seen."""
        return self.method.learnt(state)


def _inputs(run: Run) -> dict[NestedKey, Tensor]:
    """The inputs, which are changed, detached."""
    if not run.inputs:
        raise ValueError(
            f"there is no input to change: none of those that the model reads "
            f"({', '.join(map(repr, run.setup.model.attributed))}) is floating-point"
        )
    return {key: x.detach() for key, x in run.inputs.items()}
