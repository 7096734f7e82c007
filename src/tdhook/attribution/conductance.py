"""Conductance and internal influence: a layer's part, while the input comes from its baseline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook.attribution.means import Means
from tdhook.attribution.paths import ways, weighed
from tdhook.contexts.attribution import Shared
from tdhook.contexts.compared import SPREAD, Compared, Complete, compared_with, write_under
from tdhook.keys import under
from tdhook.passes.forward import Run
from tdhook.passes.runner import Runner
from tdhook.passes.variants import REACHED, Variants
from tdhook.perturbing.quadrature import quadrature
from tdhook.perturbing.references import Baseline, References
from tdhook.targets import TargetLike

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Conductance", "InternalInfluence"]


class Conductance(Complete):
    """The integral of ``df/dh dh/dt`` over the way of the input from its baseline (Dhamdhere et al. 2019, eq. 2).

    ``h`` are the layers that ``input_modules`` names, and the inputs, whose conductance is their integrated gradient.
    The sum over all units that the way goes through is ``f(x) - f(b)``, up to the trapezoid rule.

    Args:
        target: what is explained (:mod:`tdhook.targets`); by default the only output there is.
        baseline: where the way of the inputs begins (:data:`~tdhook.perturbing.references.Baseline`).
        steps: of the way.
        **options: those of :class:`~tdhook.contexts.compared.Complete`: ``samples``, ``ledger``, ``input_modules``, ...

    Raises:
        ValueError: there is no step.
    """

    def __init__(
        self,
        target: TargetLike = None,
        *,
        baseline: Baseline | References = 0.0,
        samples: int = 1,
        steps: int = 64,
        ledger: bool = False,
        **options: Unpack[Shared],
    ) -> None:
        if steps < 1:
            raise ValueError(f"a way has at least one step, got steps={steps}")
        super().__init__(target, baseline=baseline, samples=samples, ledger=ledger, **options)
        self.places = [place for place, _ in quadrature("trapezoid", steps + 1)]

    @property
    def changes_inputs(self) -> bool:
        """All inputs are."""
        return True

    def explain(self, runner: Runner, td: TensorDictBase) -> Mapping[NestedKey, Tensor]:
        """One forward pass to choose, then a forward and a backward pass for each step, as many at once as fit."""
        means = Means(self.spreads)
        with runner.forward(td) as run:
            ends, sources, meeting = _inputs(run), list(run.sources()), self.meeting(runner, run)
            variants = Variants(runner, run)
            others = [key for key in ends if self.ledger and key not in sources]
            wanted = [*sources, *others]
            for way in ways(self, run, ends):
                found: dict[NestedKey, Tensor] = {}
                last: dict[NestedKey, Tensor] = {}
                for answer in variants.gradients(len(self.places), way.at(self.places), wanted, reached=True):
                    now = {
                        key: torch.cat([last[key][None], x]) if last else x for key, x in answer.found.items()
                    }
                    last = {key: x[-1] for key, x in now.items()}
                    for key in wanted:
                        grad, value = now[key], now[under(REACHED, key)]
                        step = value.diff(dim=0)
                        step = step.unsqueeze(1) if grad.dim() > step.dim() else step
                        share = (step * (grad[1:] + grad[:-1]) / 2).sum(0)
                        found[key] = found[key] + share if key in found else share
                means.add(found)
            apart = {key: means.mean.pop(key) for key in others}
            first = {key: means.mean[key] for key in run.independent_sources()[0]}
            rises = self.rises(variants, run, ends) if self.ledger else None
            spread = {key: x for key, x in means.deviations().items() if key in sources}
            self.told(runner, run, first, rises, spread, meeting, apart)
        return means.mean


class InternalInfluence(Compared):
    """The mean gradient of a layer on the way of the input from its baseline (Leino et al. 2018, Definition 1).

    Args:
        target: what is explained (:mod:`tdhook.targets`); by default the only output there is.
        baseline: where the way of the inputs begins (:data:`~tdhook.perturbing.references.Baseline`).
        samples: how many references are drawn where the baseline is drawn.
        steps: how many gradients are averaged.
        rule: of the quadrature, as :class:`~tdhook.attribution.IntegratedGradients` takes it.
        **options: those of :class:`~tdhook.contexts.attribution.Attribution`: ``input_modules`` names the layers.
    """

    def __init__(
        self,
        target: TargetLike = None,
        *,
        baseline: Baseline | References = 0.0,
        samples: int = 1,
        steps: int = 32,
        rule: str = "gauss_legendre",
        **options: Unpack[Shared],
    ) -> None:
        super().__init__(target, **options)
        self.references, self.places = compared_with(baseline, samples), quadrature(rule, steps)

    @property
    def changes_inputs(self) -> bool:
        """All inputs are."""
        return True

    def explain(self, runner: Runner, td: TensorDictBase) -> Mapping[NestedKey, Tensor]:
        """One forward pass to choose, then a forward and a backward pass for each step, as many at once as fit."""
        means = Means(self.spreads)
        with runner.forward(td) as run:
            variants, sources = Variants(runner, run), list(run.sources())
            ends = _inputs(run)
            self.require_finite_starts(runner, variants, run, [ends])
            for way in ways(self, run, ends):
                means.add(weighed(variants, way, self.places, sources))
            write_under(SPREAD, runner, run, means.deviations())
        return means.mean


def _inputs(run: Run) -> dict[NestedKey, Tensor]:
    """The inputs, which come from their baselines."""
    if not run.inputs:
        raise ValueError(
            f"none of the inputs ({', '.join(map(repr, run.setup.model.attributed))}) is floating-point, so that none "
            "comes from a baseline on the way of which a layer could have a part: explain the layer by "
            "IntegratedGradients(input_modules=...)"
        )
    return {key: x.detach() for key, x in run.inputs.items()}
