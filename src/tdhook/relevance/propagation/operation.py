"""Operations as modules, so that the same rules apply to both."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tdhook.models.parallel import is_of_torch
from tdhook.selectors.kinds import MATRIX_PRODUCTS
from tdhook.tape.functions import on_tape

__all__ = ["Operation", "known_as", "maker_in"]


_BIAS_FIRST = frozenset(("addmm", "addmv", "addbmm", "baddbmm"))
_PRODUCTS = MATRIX_PRODUCTS - _BIAS_FIRST


class Operation(nn.Module):
    """A torch function where a rule expects a module; its class has the name of the operation.

    Tensors among its arguments that are not on the tape (weights, masks) count as its parameters.

    Attributes:
        name: the name of the operation.
        function: the torch function.
        keeps: the reason for which it keeps what its linearisation leaves of its value.
        moves: whether it moves values without changing them, and ``multiplies``: whether it multiplies its arguments.
    """

    name: str
    keeps: str
    moves: bool
    multiplies: bool
    function: Callable[..., Any]

    @staticmethod
    def of(
        name: str,
        function: Callable[..., object],
        *,
        moves: bool = False,
        multiplies: bool = False,
        keeps: str = "constant",
    ) -> Operation:
        """The stand-in for ``function``."""
        operation: Operation = type(name, (Operation,), {})()
        operation.name, operation.moves, operation.multiplies = name, moves, multiplies
        operation.keeps = keeps
        operation.__dict__["function"] = function
        return operation

    @property
    def weighted(self) -> bool:
        """Whether it is linear in one argument where the others are weights."""
        return self.name == "linear" or self.name in MATRIX_PRODUCTS or self.name.startswith("conv")

    def forward(self, /, *args: Any, **kwargs: Any) -> object:
        """Call the function."""
        return self.function(*args, **kwargs)

    def parameter_names(self, args: tuple[object, ...], kwargs: dict[str, object]) -> list[str]:
        """A name for each leaf of a call's arguments, as parameters of modules have."""
        bias = 0 if self.name in _BIAS_FIRST else 2 if self.weighted and self.name not in _PRODUCTS else None
        names: list[str] = []
        for index, argument in enumerate(args):
            name = "bias" if index == bias else "weight"
            names += [name] * _count(argument)
        for key in kwargs:
            names += [key] * _count(kwargs[key])
        return names


def _count(argument: object) -> int:
    return 1 if isinstance(argument, Tensor) else len(tree_leaves(argument))


def known_as(module: nn.Module) -> str:
    """The name by which what a module computes is known: that of an operation, or of the class of a layer of torch.

    Any other class may be called like one of these and compute something else: its name says where it is written.
    """
    kind = type(module)
    if isinstance(module, Operation) or is_of_torch(module):
        return kind.__name__
    return f"{kind.__module__}.{kind.__qualname__}"


def maker_in(name: str, args: Sequence[object], kwargs: Mapping[str, object]) -> str:
    """The name by which the value of a call is known: a negative power is a reciprocal, and a constant by it too.

    Args:
        name: what is called is known by it.
        args: with what.
        kwargs: likewise.
    """
    if name in _POWERS:
        exponent = args[1] if len(args) > 1 else kwargs.get("exponent")
        return "reciprocal" if isinstance(exponent, int | float) and exponent < 0 else name
    if name == "div" and args and not (isinstance(args[0], Tensor) and on_tape(args[0])):
        return "reciprocal"
    return name


_POWERS = ("float_power", "pow")
