"""Methods that integrate gradients on ways from references to the values that are attributed."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook.attribution.means import Means
from tdhook.contexts.compared import Complete
from tdhook.passes.forward import Run
from tdhook.passes.meeting import joint_axes
from tdhook.passes.runner import Runner
from tdhook.passes.variants import Variants

__all__ = ["Integrated", "Together"]


@dataclass(frozen=True)
class Together:
    """Values that go their ways together, since they depend on none of each other.

    Attributes:
        ends: the values by source, ``[*source]``.
        rises: how far the target is from what it is on each reference, ``[references, *batch]`` or ``[references,
            outputs, *batch]``, if it is accounted for or to be reached.
        joint: the batch axes along which their gradients say that elements depend on each other, if that is asked.
    """

    ends: Mapping[NestedKey, Tensor]
    rises: Tensor | None = None
    joint: tuple[int, ...] = ()


class Integrated(Complete):
    """A method that integrates gradients: from each reference for values that depend on none of each other.

    Attributes:
        tolerance: how far sums may be off, where they are to be so close to the difference.
    """

    tolerance: float | None = None

    @abstractmethod
    def integrated(self, run: Run, variants: Variants, values: Together) -> Means:
        """Relevance from each of the references, by source, ``[*source]`` or ``[outputs, *source]``."""

    def explain(self, runner: Runner, td: TensorDictBase) -> Mapping[NestedKey, Tensor]:
        """One forward pass to choose, then a forward and a backward pass for each point, as many at once as fit."""
        found: dict[NestedKey, Tensor] = {}
        with runner.forward(td) as run:
            groups, counted = run.independent_sources(), self.ledger or self.tolerance is not None
            # Asked before other runs, which write over what the graph of this one holds where a model counts its calls.
            asked = groups if self.tolerance is not None else groups[:1] if self.ledger else []
            seeds = run.seeds(runner.setup.question.target)
            joint = [joint_axes(run, seeds, ends) for ends in asked]
            joint += [()] * (len(groups) - len(joint))
            variants = Variants(runner, run)
            if not counted:
                self.require_finite_starts(runner, variants, run, groups)
            for ends, axes in zip(groups, joint, strict=True):
                rises = self.rises(variants, run, ends) if counted else None
                means = self.integrated(run, variants, Together(ends, rises, axes))
                found.update(means.mean)
                self.told(runner, run, means.mean, rises, means.deviations(), joint[0])
        return found
