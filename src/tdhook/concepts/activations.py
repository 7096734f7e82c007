"""Activations: what a layer computes, by a forward pass alone, where methods write relevance."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook.contexts.attribution import Attribution
from tdhook.passes.runner import Runner

__all__ = ["Activations"]


class Activations(Attribution):
    """The values of what is attributed, as its relevance: nothing is explained, and no backward pass is made."""

    def explain(self, runner: Runner, td: TensorDictBase) -> Mapping[NestedKey, Tensor]:
        """One forward pass."""
        with torch.no_grad(), runner.forward(td) as run:
            return {key: value.detach() for key, value in run.sources().items()}
