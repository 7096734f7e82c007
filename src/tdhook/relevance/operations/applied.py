"""Autograd functions and operators of other libraries, as they reach an interception."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tdhook.relevance.propagation.rule import Rule
from tdhook.selectors.names import TORCH, told_apart
from tdhook.tape.functions import TapeFunction
from tdhook.tape.internals import function_inside, operator_name, schema_of
from tdhook.tape.trees import tree_leaves, tree_map_tensors

__all__ = ["Applied", "is_foreign", "is_ours", "overwrites_arguments"]


class Applied:
    """One application of an autograd function, as a function of tensors under the name of its class.

    Attributes:
        function: the autograd function, also where ``torch.vmap`` made another one of it.
    """

    def __init__(self, function: type, apply: Callable[..., Any]) -> None:
        self.function, self._apply = function_inside(function), apply
        self.__name__ = told_apart(self.function.__module__, self.function.__name__)

    def __call__(self, *args: object, **kwargs: object) -> Any:
        """Apply it."""
        return self._apply(*args, **kwargs)

    def with_constants(self, on_tape: object, off: object) -> Applied:
        """The same application, given constants on their tape wherever a call has them off it.

        Its backward pass may differentiate with respect to them, as adjoint methods do with respect to parameters.

        Args:
            on_tape: the arguments as the model gave them.
            off: the same with constants off the tape, as the rule sees them.
        """
        pairs = zip(tree_leaves(off), tree_leaves(on_tape), strict=True)
        swapped = {id(x): (x, given) for x, given in pairs if x is not given}

        def apply(*args: object, **kwargs: object) -> Any:
            args, kwargs = tree_map_tensors(lambda x: swapped.get(id(x), (x, x))[1], (args, kwargs))
            return self._apply(*args, **kwargs)

        return Applied(self.function, apply)


def overwrites_arguments(function: object) -> bool:
    """Whether an autograd function or an operator says that it overwrites an argument."""
    if not isinstance(function, Applied):
        schema = schema_of(function)
        return schema is not None and bool(schema.is_mutable)
    methods = (getattr(function.function, name, None) for name in ("forward", "setup_context"))
    codes = (getattr(method, "__code__", None) for method in methods)
    return any(code is not None and "mark_dirty" in code.co_names for code in codes)


def is_ours(function: object) -> bool:
    """Whether an autograd function is one of this library, a user's rule included."""
    return isinstance(function, type) and issubclass(function_inside(function), Rule | TapeFunction)


def is_foreign(function: object) -> bool:
    """Whether a function is an operator that ``torch.library`` was told of, and none of torch's own."""
    operator = operator_name(function)
    return operator is not None and operator[0] not in TORCH
