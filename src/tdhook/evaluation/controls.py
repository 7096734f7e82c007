"""What explanations are compared with: a map that knows nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook.contexts.attribution import Attribution, Shared
from tdhook.models.model import Model
from tdhook.passes.runner import Runner
from tdhook.targets import TargetLike

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["RandomMap"]


class RandomMap(Attribution):
    """Random numbers between 0 and 1: what a map is worth that knows nothing of the model.

    Each call draws anew, one call after the other from a generator of its own.

    Args:
        target: what would be explained; it changes nothing.
        seed: of the generator.
        **options: those of :class:`~tdhook.contexts.attribution.Attribution`: ``attribute``, ``attribution_key``, ...
    """

    def __init__(self, target: TargetLike = None, *, seed: int = 0, **options: Unpack[Shared]) -> None:
        super().__init__(target, **options)
        self.seed = seed

    def start(self, model: Model) -> torch.Generator:
        """The generator."""
        return torch.Generator().manual_seed(self.seed)

    def explain(self, runner: Runner, td: TensorDictBase) -> Mapping[NestedKey, Tensor]:
        """The next random numbers, of the shape that relevance would have."""
        with runner.forward(td) as run:
            several = run.seeds(self.seeder).several
            shapes = {
                key: (x.new_empty(()), x.shape if several is None else (several, *x.shape))
                for key, x in run.sources().items()
            }
        return {
            key: torch.rand(shape, generator=runner.state, dtype=torch.float64).to(like)
            for key, (like, shape) in shapes.items()
        }
