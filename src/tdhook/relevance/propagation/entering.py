"""Entering: the rule of a layer that makes its weights itself is that of the linear operation which they reach."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from tdhook.relevance.propagation.call import Call, Run
from tdhook.relevance.propagation.inherited import LINEAR
from tdhook.relevance.propagation.operation import Operation
from tdhook.selectors.names import name_of
from tdhook.tape.dependence import Dependence
from tdhook.tape.functions import on_tape

__all__ = ["OnLinearOperations", "is_linear", "no_operation"]


def is_linear(operation: Operation, args: object, kwargs: object) -> bool:
    """Whether a call is linear in one argument, all others being constants."""
    if not operation.weighted:
        return False
    return sum(isinstance(x, Tensor) and on_tape(x) for x in tree_leaves((args, kwargs))) == 1


class OnLinearOperations(TorchFunctionMode):
    """Runs the linear operations of one call of a layer under a rule, where no plan does so.

    Args:
        bound: how an operation runs under the rule.
    """

    def __init__(self, bound: Callable[[nn.Module], Run]) -> None:
        super().__init__()
        self._bound, self._found = bound, False
        self._dependence = Dependence()
        self._dependence.begin()

    def run(self, call: Call) -> Any:
        """Make the call, whose arguments came onto the tape after this was made."""
        with self:
            result = call.natively()
        if not self._found:
            raise NotImplementedError(no_operation(call.module))
        return result

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        live, foreign = self._dependence.look((args, kwargs))
        if foreign:
            args, kwargs = self._dependence.constants_off((args, kwargs), own=live)
        if not live or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        operation = Operation.of(name_of(func), func)
        if not is_linear(operation, args, kwargs):
            return func(*args, **kwargs)
        self._found = True
        return self._bound(operation)(Call(operation, func, args, kwargs))


def no_operation(module: nn.Module, rule: object = None, name: str = LINEAR) -> str:
    """What is wrong where the operation is not found that a rule is for."""
    kind = type(module).__name__
    if name != LINEAR:
        return (
            f"{rule!r} is given to a layer that {kind} derives from, but {kind} computes in its own way, without "
            f"`{name}`: name its class, (Type({kind}), {rule!r}), and it runs as one unit, or leave it to its "
            "operations"
        )
    return (
        f"the rule modifies weights, but {kind} performs no linear operation with weights; give {kind} another rule, "
        "EpsilonRule say"
    )
