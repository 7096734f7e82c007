"""Averaged: any method, over noise, references, or transforms that can be undone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook.attribution.around import AroundMethod, explained_first
from tdhook.attribution.explanations import against, explanations
from tdhook.attribution.moments import Moment, Moments
from tdhook.contexts.attribution import Attribution
from tdhook.contexts.compared import ERROR, SPREAD, Compared, compared
from tdhook.passes.runner import Runner
from tdhook.perturbing.draws import Draws
from tdhook.perturbing.references import References
from tdhook.targets.through import tells_units

__all__ = ["Averaged"]


class Averaged(AroundMethod):
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
        self, method: Attribution, over: Draws | References, *, of: Moment = "mean", spread: bool = False
    ) -> None:
        if method.writes or method.writes_under:
            besides = ", ".join(map(repr, [*method.writes, *method.writes_under]))
            raise ValueError(
                f"{method!r} writes {besides} besides relevance, which would be that of one of many: leave out ledger, "
                "errors, and the values and spread of References; of interactions there is no mean"
            )
        Moments.require(of, spread, over.samples)
        super().__init__(against(method, over))
        self.over, self.of, self.spread = over, of, spread
        # What the method compares with by itself, where it is averaged over others.
        self._own = (
            method.references if isinstance(over, References) and isinstance(method, Compared) else None
        )

    def __repr__(self) -> str:
        return f"Averaged({self.method!r}, over={self.over!r})"

    @property
    def changes_inputs(self) -> bool:
        """All inputs are."""
        return True

    def explain(self, runner: Runner, td: TensorDictBase) -> Mapping[NestedKey, Tensor]:
        """One forward pass to choose, then what the method does for each draw, as many at once as fit.

        Which units matter most is said by the method before all else: on the input as it is, against its own reference.
        """
        if tells_units(runner.setup.question.target):
            _, named = explained_first(compared(self.method, self._own), runner, td)
            found = self.explaining(named.setup.question.target).explain(named, named.td)
            runner.beside.update(named.beside)
            return found
        moments, summed = Moments(self.of, self.spread), self.of == "mean" and not self.spread
        with runner.forward(td) as run:
            for some in explanations(self.method, self.over, runner, run, mean=summed):
                moments.add(some)
            return moments.written(runner, run)

    @property
    def writes_under(self) -> tuple[str, ...]:
        """``"spread"`` and ``"standard_error"``, if they were asked for."""
        return (SPREAD, ERROR) if self.spread else ()

    def reads_signs(self, state: Any) -> bool:
        """Noise may take away that no input is negative."""
        return False
