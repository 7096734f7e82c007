"""What explanations are compared with: the gradient, gradient times input, and a map that knows nothing.

Each is an attribution method like :class:`~tdhook.attribution.lrp.LRP`, with the same ``wrap`` and ``prepare``.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook.contexts.attribution import Attribution, Conditions, Record
from tdhook.conventions import Convention
from tdhook.models.model import Model
from tdhook.targets import Seeds, TargetLike, as_seeder

__all__ = ["Gradient", "GradientTimesInput", "RandomMap"]


class _Control(Attribution):
    """Runs the model as it is.

    Args:
        target: what is explained (:mod:`tdhook.targets`); by default the only output there is.
        **options: those of :class:`~tdhook.contexts.attribution.Attribution`: ``attribute``, ``attribution_key``, ...
    """

    def __init__(self, target: TargetLike = None, **options: Any) -> None:
        super().__init__(**options)
        self.target = target
        self._seeder = as_seeder(target)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(target={self.target!r})"

    def start(self, model: Model) -> Any:
        """There is nothing to work out."""
        return None

    @contextmanager
    def active(self, state: Any, model: Model, td: TensorDictBase) -> Iterator[Conditions]:
        """Change nothing; the model may overwrite what it is given."""
        yield Conditions("gradient", overwrites=True)

    def seeds(self, record: Record, td: TensorDictBase, flow: Convention) -> Seeds:
        """Start from the target."""
        return self._seeder(record.outputs, td, flow)

    def explaining(self, target: TargetLike) -> _Control:
        """The same for another target."""
        other = copy.copy(self)
        other.target, other._seeder = target, as_seeder(target)
        return other

    def extra_out_keys(self) -> tuple[NestedKey, ...]:
        """What the target computes."""
        return tuple(self._seeder.writes)

    def target_entries(self) -> Sequence[NestedKey] | None:
        """Those that the target reads."""
        return self._seeder.entries

    def derive(self, outputs: TensorDictBase, inputs: TensorDictBase) -> TensorDictBase:
        """Let the target compute what it explains."""
        return self._seeder.derive(outputs, inputs)


class Gradient(_Control):
    """The size of the gradient of the target: the saliency map (Simonyan, Vedaldi and Zisserman 2014, section 3).

    Args:
        target: what is explained (:mod:`tdhook.targets`); by default the only output there is.
        signed: whether to write the gradient itself. It says in which direction the target grows, not what spoke for
            it, so that its size is the usual map.
        **options: those of :class:`~tdhook.contexts.attribution.Attribution`: ``attribute``, ``attribution_key``, ...
    """

    def __init__(self, target: TargetLike = None, *, signed: bool = False, **options: Any) -> None:
        super().__init__(target, **options)
        self.signed = signed

    def relevance(self, state: Any, value: Tensor, grad: Tensor, flow: Convention) -> Tensor:
        """The gradient, or its size."""
        return grad if self.signed else grad.abs()


class GradientTimesInput(_Control):
    """The gradient of the target times the input: the first-order share of each input (Shrikumar et al. 2016).

    Args:
        target: what is explained (:mod:`tdhook.targets`); by default the only output there is.
        **options: those of :class:`~tdhook.contexts.attribution.Attribution`: ``attribute``, ``attribution_key``, ...
    """

    def relevance(self, state: Any, value: Tensor, grad: Tensor, flow: Convention) -> Tensor:
        """Value times gradient."""
        return value * grad


class RandomMap(_Control):
    """Random numbers between 0 and 1: what a map is worth that knows nothing of the model.

    Each call draws anew, one call after the other from a generator of its own.

    Args:
        target: what would be explained; it changes nothing.
        seed: of the generator.
        **options: those of :class:`~tdhook.contexts.attribution.Attribution`: ``attribute``, ``attribution_key``, ...
    """

    def __init__(self, target: TargetLike = None, *, seed: int = 0, **options: Any) -> None:
        super().__init__(target, **options)
        self.seed = seed

    def start(self, model: Model) -> torch.Generator:
        """The generator."""
        return torch.Generator().manual_seed(self.seed)

    def relevance(self, state: torch.Generator, value: Tensor, grad: Tensor, flow: Convention) -> Tensor:
        """The next random numbers."""
        drawn = torch.rand(grad.shape, generator=state, dtype=torch.float64)
        return drawn.to(device=grad.device, dtype=grad.dtype)
