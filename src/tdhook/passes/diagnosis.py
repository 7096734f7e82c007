"""Where a value that is not finite comes from."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor, nn

from tdhook.models.model import Model
from tdhook.models.state import dense_copy, restored
from tdhook.tape.conditions import holds
from tdhook.tape.undoing import Hook, hooked

__all__ = ["is_explainable", "why_not_finite"]


def is_explainable(z: Tensor, seed: Tensor) -> bool:
    """Whether the values that are explained are finite; others may be infinite, as masked logits are.

    Args:
        z: an output.
        seed: what the backward pass starts with there, of the same shape, or with one more leading axis.
    """
    z = z.detach()
    if not torch.compiler.is_compiling() and math.isfinite((z * seed).sum().item()):
        return True
    return holds(seed.isfinite() & torch.where(seed == 0, 0.0, z).isfinite())


def why_not_finite(model: Model, in_keys: Sequence[NestedKey], target: NestedKey, td: TensorDictBase) -> str:
    """Which input or module of a model makes a target NaN or infinite."""
    for key in in_keys:
        value = td.get(key)
        if isinstance(value, Tensor) and value.is_floating_point() and not bool(value.isfinite().all()):
            count = int((~value.isfinite()).sum())
            return f"input {key!r} has {count} NaN or infinite values among its {value.numel()}"
    return (
        f"the value of the target {target!r} is NaN or infinite though all inputs are finite: "
        f"{_culprit(model, td)}"
    )


def _culprit(model: Model, td: TensorDictBase) -> str:
    """The first module whose output is not finite."""
    found: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: object, output: object) -> None:
            if isinstance(output, Tensor) and not found and not bool(output.isfinite().all()):
                found.append(f"module {name!r} ({type(module).__name__}) is the first to return such a value")

        return hook

    hooks: list[Hook] = [(m.register_forward_hook, watch(name), {}) for name, m in model.root.named_modules()]
    with hooked(*hooks), torch.no_grad(), restored(model.root):
        model.run(dense_copy(td))
    return found[0] if found else "it arises outside of any module"
