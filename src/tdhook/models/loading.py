"""Loading: the parameters and buffers of one model, copied into another like it, in whichever form they are sent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from tdhook.keys import parts_of
from tdhook.models.parallel import unwrapped

__all__ = ["Weights", "load_weights"]

Weights: TypeAlias = "nn.Module | Mapping[str, Tensor] | TensorDictBase"
"""A model, its ``state_dict``, or a TensorDict of its parameters."""

# What torch puts before the names of a model that it wraps.
_PREFIXES = ("module.", "_orig_mod.")


def load_weights(model: nn.Module, weights: Weights) -> None:
    """Copy weights into a model.

    Raises:
        ValueError: they are not those of a model like it; nothing is copied then.
    """
    ours = _named(model)
    given = _by_name(weights)
    for prefix in _PREFIXES:
        if given and all(name.startswith(prefix) for name in given) and not given.keys() & ours.keys():
            given = {name.removeprefix(prefix): value for name, value in given.items()}
    needed = model.state_dict().keys() & ours.keys()
    wrong = [*sorted(given.keys() - ours.keys()), *sorted(needed - given.keys())]
    wrong += [name for name in ours.keys() & given.keys() if not _fits(ours[name], given[name])]
    if wrong:
        raise ValueError(
            f"these weights do not fit a {type(model).__name__}: {', '.join(wrong)} "
            f"{'is' if len(wrong) == 1 else 'are'} missing, too many, or of another shape; send those of one like it"
        )
    with torch.no_grad():
        for name, value in given.items():
            ours[name].copy_(value)


def _by_name(weights: Weights) -> dict[str, Tensor]:
    if isinstance(weights, nn.Module):
        return _named(unwrapped(weights))
    if isinstance(weights, TensorDictBase):
        return {".".join(parts_of(key)): value for key, value in weights.items(True, True)}
    return {name: value for name, value in weights.items() if isinstance(value, Tensor)}


def _named(model: nn.Module) -> dict[str, Tensor]:
    found: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    return found | dict(model.named_buffers(remove_duplicate=False))


def _fits(ours: Tensor, given: Tensor) -> bool:
    return not is_lazy(ours) and not is_lazy(given) and ours.shape == given.shape
