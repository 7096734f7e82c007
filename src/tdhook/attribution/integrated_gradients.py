"""Integrated gradients: the gradient, averaged on the way from a baseline to the input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook.attribution.integrated import Integrated, Together
from tdhook.attribution.means import Means
from tdhook.attribution.paths import Way, along, ways, weighed
from tdhook.attribution.tolerance import require_tolerance, until_close
from tdhook.contexts.attribution import Shared
from tdhook.passes.forward import Run
from tdhook.passes.runner import Runner
from tdhook.passes.variants import Variants
from tdhook.perturbing.quadrature import quadrature
from tdhook.perturbing.references import Baseline, References
from tdhook.targets import TargetLike

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["IntegratedGradients"]

_STEPS, _MOST = 32, 1025
"""By default, and at most where there is a tolerance."""


class IntegratedGradients(Integrated):
    """``(x - b) * integral of df/dx(b + t (x - b)) over t in [0, 1]`` (Sundararajan et al. 2017, eq. 1).

    The sum over the inputs is ``f(x) - f(b)``, up to the quadrature. The target chooses once, at the input. Inputs, or
    embeddings of several, go their ways together; a value that depends on others goes its own.

    Args:
        target: what is explained (:mod:`tdhook.targets`); by default the only output there is.
        baseline: where the way begins (:data:`~tdhook.perturbing.references.Baseline`); data are those of the batch.
        steps: how many gradients are averaged, by default 32; with ``tolerance``, at most, by default 1025.
        rule: of the quadrature: ``"gauss_legendre"``, ``"trapezoid"``, ``"left"``, ``"middle"`` or ``"right"``.
        tolerance: how far the sum may be from ``f(x) - f(b)``, in units of the target. Each batch element has twice as
            many steps until it is that close (9, 17, 33, ...; the trapezoid rule, or Simpson's, which is closer where
            the model is smooth). Elements that depend on each other, as the steps of a recurrent model do, are
            complete together, so that their sum is to be that close.
        ledger: whether to account for it (:class:`~tdhook.contexts.compared.Complete`).
        **options: those of :class:`~tdhook.contexts.compared.Complete`: ``samples``, ``input_modules``, ...

    Raises:
        ValueError: there is no step, no such quadrature, or the tolerance is not positive, to be compiled, or to be
            seen in fewer than 9 steps.
    """

    def __init__(
        self,
        target: TargetLike = None,
        *,
        baseline: Baseline | References = 0.0,
        samples: int = 1,
        steps: int | None = None,
        rule: str = "gauss_legendre",
        tolerance: float | None = None,
        ledger: bool = False,
        **options: Unpack[Shared],
    ) -> None:
        super().__init__(target, baseline=baseline, samples=samples, ledger=ledger, **options)
        self.steps = (_STEPS if tolerance is None else _MOST) if steps is None else steps
        self.places, self.tolerance = quadrature(rule, self.steps), tolerance
        require_tolerance(tolerance, self.steps, compiled=self.compile is not None)

    def integrated(self, run: Run, variants: Variants, values: Together) -> Means:
        """The way from each reference times the mean gradient on it, or until that is close to the difference."""
        means = Means(self.spreads)
        for number, way in enumerate(ways(self, run, values.ends)):
            if self.tolerance is None or values.rises is None:
                means.add(along(variants, way, self.places))
            else:
                rise = values.rises[number]
                means.add(until_close(variants, way, rise, self.tolerance, self.steps, values.joint))
        return means

    def coefficients(
        self, runner: Runner, td: TensorDictBase, there: Mapping[NestedKey, Tensor]
    ) -> Mapping[NestedKey, Tensor]:
        """The mean gradient of all sources, on the way of what the method attributes from ``there`` to ``td``.

        Raises:
            ValueError: a tolerance was given, which is one of sums over the inputs.
        """
        if self.tolerance is not None:
            raise ValueError(
                "a tolerance is of the sum over the inputs, and coefficients have none: give steps instead"
            )
        with runner.forward(td) as run:
            ends = {key: x.detach() for key, x in run.sources(self.begun(run)).items()}
            way = Way({key: there[key].unsqueeze(0) for key in ends}, ends)
            return weighed(Variants(runner, run), way, self.places, run.sources())
