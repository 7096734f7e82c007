"""Where a value that is not finite comes from."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tdhook.models.entries import dense_copy
from tdhook.models.model import Model
from tdhook.models.state import restored
from tdhook.selectors.names import name_of
from tdhook.tape.conditions import holds
from tdhook.tape.functions import Identity
from tdhook.tape.trees import tree_leaves
from tdhook.tape.undoing import Hook, hooked

__all__ = ["NOT_FINITE", "is_explainable", "why_not_finite", "why_relevance_is_not"]

NOT_FINITE = "is NaN or infinite though all inputs are finite"
"""What is said of a target where it is the model's doing."""


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
    return f"the value of the target {target!r} {NOT_FINITE}: {_culprit(model, td)}"


def why_relevance_is_not(model: Model, keys: Sequence[NestedKey], dtype: torch.dtype, node: Any) -> str:
    """What made the relevance of some keys NaN or infinite, though what is explained is finite.

    Args:
        model: the model.
        keys: the keys.
        dtype: the precision of their relevance.
        node: the node of the tape at which it arose, if it is known.
    """
    where = "" if node is None else f": it arises in the backward pass of {_name_of_node(model, node)}"
    if dtype is torch.float16:
        advice = (
            "; float16 has no numbers beyond 65504: explain the model in float32, or under torch.autocast"
        )
    else:
        advice = "; mask out what is divided by zero there before it is computed, or give it another rule"
    if dtype in (torch.float32, torch.bfloat16):
        advice += f"; if nothing is, relevance grows beyond {torch.finfo(dtype).max:.1e}: explain the model in float64"
    named = ", ".join(map(repr, keys))
    return f"the relevance of {named} is NaN or infinite though the target is finite{where}{advice}"


def _name_of_node(model: Model, node: Any) -> str:
    # What is put on the tape beside operations has no name of the model's.
    node = Identity.before(node)[0] or node
    unit = getattr(getattr(node, "executed", None), "module", None)
    for path, module in model.root.named_modules():
        if module is unit:
            return f"module {path!r} ({type(module).__name__})"
    name = getattr(node, "made_by", None) or (
        re.sub(r"Backward\d*$", "", node.name()) if unit is None else type(unit).__name__
    )
    return f"the operation `{name}`"


def _culprit(model: Model, td: TensorDictBase) -> str:
    """The first module whose output is not finite, and the operation in it."""
    watch = _Watch()
    hooks: list[Hook] = []
    for name, module in model.root.named_modules():
        hooks.append((module.register_forward_pre_hook, watch.enter(name), {}))
        hooks.append((module.register_forward_hook, watch.leave(name), {}))
    with hooked(*hooks), torch.no_grad(), restored(model.root), watch:
        model.tried(dense_copy(td))
    return watch.first or "it arises outside of any module"


class _Watch(TorchFunctionMode):
    """Watches a model run for what first returns a value that is not finite.

    Infinities that the model was given, as masked logits are, are not to blame.

    Attributes:
        first: what first returned NaN, or made infinities of finite numbers, in words.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first: str | None = None
        self._within: list[tuple[str, nn.Module]] = []

    def enter(self, name: str) -> Callable[..., None]:
        """A hook before a module."""
        return lambda module, args: self._within.append((name, module))

    def leave(self, name: str) -> Callable[..., None]:
        """A hook behind it."""

        def hook(module: nn.Module, args: object, output: object) -> None:
            self._look(args, output, module, name, "")
            while self._within and self._within.pop()[1] is not module:
                pass  # of what was left by an exception

        return hook

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._within:
            name, module = self._within[-1]
            self._look((args, kwargs), result, module, name, f", made by the operation `{name_of(func)}`")
        return result

    def _look(self, args: object, result: object, module: nn.Module, path: str, how: str) -> None:
        if self.first is not None:
            return
        made = list(_floats(result))
        who = f"module {path!r}" if path else "the model itself"
        told = f"{who} ({type(module).__name__}) is the first to return such a value{how}"
        if any(bool(x.isnan().any()) for x in made):
            self.first = told
        elif any(bool(x.isinf().any()) for x in made):
            given = [bool(x.isfinite().all()) for x in _floats(args)]
            if all(given) and all(map(math.isfinite, _numbers(args))):
                self.first = told


def _floats(value: object) -> Iterator[Tensor]:
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex()):
            yield leaf


def _numbers(value: object) -> Iterator[float]:
    return (leaf for leaf in tree_leaves(value) if isinstance(leaf, float))
