"""Checkpoints: weights of the same policy at other times, in memory or in files."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TypeAlias

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from tdhook.models.loading import Weights

__all__ = ["Checkpoint", "tensors_of", "weights_of"]

Checkpoint: TypeAlias = "Weights | str | os.PathLike[str]"
"""Weights of a policy, or a file of them."""


def weights_of(given: Checkpoint) -> Weights:
    """Weights, read from a file where they are one: plain data, as ``torch.save(module.state_dict(), path)`` writes."""
    if not isinstance(given, str | os.PathLike):
        return given
    path = Path(given)
    if not path.exists():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    found = torch.load(path, map_location="cpu", weights_only=True)
    inner = found.get("state_dict") if isinstance(found, dict) else None
    found = inner if isinstance(inner, dict) else found
    if not isinstance(found, dict) or not any(isinstance(one, Tensor) for one in found.values()):
        raise ValueError(
            f"{path} holds no weights: a checkpoint is a state_dict, or has one under 'state_dict'"
        )
    return found


def tensors_of(weights: Weights) -> Iterable[Tensor]:
    """All weights, in the order of their names."""
    if isinstance(weights, nn.Module):
        weights = weights.state_dict()
    if isinstance(weights, TensorDictBase):
        return [x for _, x in sorted(weights.flatten_keys().items()) if isinstance(x, Tensor)]
    return [x for _, x in sorted(weights.items()) if isinstance(x, Tensor)]
