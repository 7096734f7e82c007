"""The gradient of the target, and the gradient times the input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook.contexts.attribution import Attribution, Shared
from tdhook.conventions import relevance_of
from tdhook.passes.runner import Runner
from tdhook.targets import TargetLike
from tdhook.targets.base import Seeder

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Gradient", "GradientTimesInput"]


class Gradient(Attribution):
    """The size of the gradient of the target: the saliency map (Simonyan, Vedaldi and Zisserman 2014, section 3).

    Args:
        target: what is explained (:mod:`tdhook.targets`); by default the only output there is.
        signed: whether to write the gradient itself. It says in which direction the target grows, not what spoke for
            it, so that its size is the usual map.
        **options: those of :class:`~tdhook.contexts.attribution.Attribution`: ``attribute``, ``attribution_key``, ...
    """

    def __init__(self, target: TargetLike = None, *, signed: bool = False, **options: Unpack[Shared]) -> None:
        super().__init__(target, **options)
        self.signed = signed

    @property
    def is_gradient(self) -> bool:
        """With its sign, it is."""
        return self.signed and type(self).explain is Gradient.explain

    def explain(self, runner: Runner, td: TensorDictBase) -> Mapping[NestedKey, Tensor]:
        """One forward pass, one backward pass."""
        pulled = _gradient(runner, td, self.seeder)
        return pulled if self.signed else {key: grad.abs() for key, grad in pulled.items()}

    def coefficients(
        self, runner: Runner, td: TensorDictBase, there: Mapping[NestedKey, Tensor]
    ) -> Mapping[NestedKey, Tensor]:
        """The gradient, with its sign."""
        return _gradient(runner, td, self.seeder)


class GradientTimesInput(Attribution):
    """The gradient of the target times the input: the first-order share of each input (Shrikumar et al. 2016)."""

    def explain(self, runner: Runner, td: TensorDictBase) -> Mapping[NestedKey, Tensor]:
        """One forward pass, one backward pass, value times gradient."""
        with runner.forward(td) as run:
            sources = run.sources()
            pulled = run.pull(run.seeds(self.seeder), sources)
            return {key: relevance_of(sources[key], grad, "gradient") for key, grad in pulled.items()}

    def coefficients(
        self, runner: Runner, td: TensorDictBase, there: Mapping[NestedKey, Tensor]
    ) -> Mapping[NestedKey, Tensor]:
        """The gradient."""
        return _gradient(runner, td, self.seeder)


def _gradient(runner: Runner, td: TensorDictBase, target: Seeder) -> dict[NestedKey, Tensor]:
    with runner.forward(td) as run:
        return run.pull(run.seeds(target), run.sources())
