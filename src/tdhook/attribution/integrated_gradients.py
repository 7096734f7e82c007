"""Integrated gradients: the gradient, averaged on the way from a baseline to the input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor, lerp

from tdhook.contexts.attribution import Attribution, Shared
from tdhook.passes.runner import Runner
from tdhook.perturbing.baselines import Baseline, references
from tdhook.perturbing.quadrature import gauss_legendre
from tdhook.targets import TargetLike

if TYPE_CHECKING:
    from typing_extensions import Unpack


class IntegratedGradients(Attribution):
    """``(x - b) * integral of df/dx(b + t (x - b)) over t in [0, 1]`` (Sundararajan et al. 2017, eq. 1).

    The sum over the inputs is ``f(x) - f(b)``, up to the quadrature (Gauss-Legendre). The target chooses once, at the
    input. Inputs, or embeddings of several, go their ways together; a value that depends on others goes its own.

    Args:
        target: what is explained (:mod:`tdhook.targets`); by default the only output there is.
        baseline: where the way begins (:data:`~tdhook.perturbing.baselines.Baseline`); data are those of the batch.
        steps: how many gradients are averaged.
        **options: those of :class:`~tdhook.contexts.attribution.Attribution`: ``attribute``, ``input_modules``, ...
    """

    def __init__(
        self,
        target: TargetLike = None,
        *,
        baseline: Baseline = 0.0,
        steps: int = 32,
        **options: Unpack[Shared],
    ) -> None:
        super().__init__(target, **options)
        self.baseline, self.way = baseline, gauss_legendre(steps)

    def explain(self, runner: Runner, td: TensorDictBase) -> Mapping[NestedKey, Tensor]:
        """One forward pass to choose, then a forward and a backward pass for each step, many of them at once."""
        with runner.forward(td) as run:
            target, asked = runner.pinned(run)
            found: dict[NestedKey, Tensor] = {}
            for ends in run.independent_sources():
                starts = references(self.baseline, ends, run.batch_dims(ends))
                for place, weight in self.way:
                    point = {key: lerp(starts[key], x, place) for key, x in ends.items()}
                    with runner.forward(asked, target=target, replaced=point) as there:
                        pulled = there.pull(there.seeds(target), there.sources(ends))
                    for key, grad in pulled.items():
                        share = (ends[key] - starts[key]) * (weight * grad)
                        found[key] = found[key] + share if key in found else share
        return found
