"""Restored values: a value that goes on as it is, and whose gradient goes to what was made of it."""

from __future__ import annotations

from torch import Tensor

from tdhook.tape.as_one import as_one_that_keeps
from tdhook.tape.functions import Context, TapeFunction

__all__ = ["restored"]


class _Restored(TapeFunction):
    """``value``, on the tape as if it were ``made + constant``."""

    @staticmethod
    def forward(made: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        """Nothing is kept."""

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> object:
        return grad, None


@as_one_that_keeps("reconstruction")
def restored(made: Tensor, value: Tensor) -> Tensor:
    """The value itself, which is ``made`` and what is missing from it, held constant.

    Args:
        made: ``[*shape]``, what gets the gradient.
        value: ``[*shape]``, what is returned, to the last bit; off the tape.
    """
    found: Tensor = _Restored.apply(made, value)
    return found
