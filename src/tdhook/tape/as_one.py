"""Functions of tensors that are one operation, whatever they compute inside."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TypeVar, cast

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function
from torch.utils._pytree import tree_leaves

__all__ = [
    "as_one",
    "as_one_that_keeps",
    "inside_of",
    "is_of_single_values",
    "is_one",
    "kept_by",
    "of_single_values",
]

F = TypeVar("F", bound=Callable[..., Tensor])
_MARK = "tdhook_as_one"
_SINGLE = "tdhook_of_single_values"


def is_one(function: Callable[..., object]) -> bool:
    """Whether a function was made one operation."""
    return hasattr(function, _MARK)


def kept_by(function: Callable[..., object]) -> str:
    """The reason for which a function keeps what its linearisation leaves of its value."""
    return str(getattr(function, _MARK, "constant"))


def of_single_values(function: F) -> F:
    """Say of one operation that what it returns are functions of single values, or sums of such.

    Between two inputs its operations share then what the integrated gradient of the whole shares, in closed form.
    """
    setattr(function, _SINGLE, True)
    return function


def is_of_single_values(function: Callable[..., object]) -> bool:
    """Whether that was said of a function."""
    return hasattr(function, _SINGLE)


def inside_of(function: Callable[..., object]) -> Callable[..., object]:
    """What was made one operation."""
    return cast("Callable[..., object]", getattr(function, "__wrapped__"))  # noqa: B009 (no attribute of its type)


def as_one(function: F) -> F:
    """Have a function of tensors explained as one operation, and not by the operations inside it.

    It runs under the generic epsilon rule, ``R_i = x_i df/dx_i R / f``: gradient times input, and what that leaves of
    the value (the zeroth term of the linearisation) is absorbed as a constant. A composite can name it like any
    operation, ``Op("name of the function")``, and give it another rule.
    """
    return as_one_that_keeps("constant")(function)


def as_one_that_keeps(reason: str) -> Callable[[F], F]:
    """The same, where what is left of the value is absorbed for another reason."""

    def made(function: F) -> F:
        @wraps(function)
        def whole(*args: object, **kwargs: object) -> Tensor:
            tensors = tuple(x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor))
            if has_torch_function(tensors):
                return handle_torch_function(whole, tensors, *args, **kwargs)
            return function(*args, **kwargs)

        setattr(whole, _MARK, reason)
        return cast(F, whole)

    return made
