"""What made a value, as far as the tape tells."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

from torch import Tensor

from tdhook.tape.functions import Identity, unwrapped
from tdhook.tape.internals import maker_of

__all__ = ["is_nonnegative", "made_by", "mark_nonnegative"]

_MOVES = (
    *(
        "Split",
        "UnsafeSplit",
        "Unbind",
        "Select",
        "Slice",
        "View",
        "UnsafeView",
        "Reshape",
        "Unsqueeze",
        "Squeeze",
    ),
    *("Expand", "Transpose", "Permute", "TBackward", "Alias", "Clone", "ToCopy"),
)
# What a gate may go through and stay one: 1 - gate, and moving it about.
_KEEPS_GATE = (*_MOVES, "Rsub", "Sub")
_KEEPS_SIGN = (*_MOVES, "MaxPool", "AvgPool", "AdaptiveMaxPool", "AdaptiveAvgPool", "Mean", "Sum", "Upsample")
_MARK = "_nonnegative"
_NONNEGATIVE = frozenset(
    ("abs", "exp", "relu", "relu6", "sigmoid", "hardsigmoid", "softmax", "softplus", "sqrt")
)


def made_by(x: Tensor, names: Set[str]) -> bool:
    """Whether one of these operations made ``x``, or what ``x`` was taken from, or one minus it."""
    return _made_by(x, names, _KEEPS_GATE)


def is_nonnegative(x: Tensor) -> bool:
    """Whether ``x`` cannot be negative, since a ReLU made it, say."""
    return _made_by(x, _NONNEGATIVE, _KEEPS_SIGN, marked=True)


def _made_by(x: Tensor, names: Set[str], through: tuple[str, ...], marked: bool = False) -> bool:
    node: Any = unwrapped(x).grad_fn
    while node is not None:
        kind = type(node).__name__
        made = maker_of(node)
        maker = kind if made is None else getattr(node, "made_by", kind)
        if maker.removesuffix("Backward0").lower() in names:
            return True
        identity = made is not None and issubclass(made, Identity)
        if marked and hasattr(getattr(node, "variable", None), _MARK):
            return True
        parents = [parent for parent, _ in node.next_functions if parent is not None]
        if len(parents) != 1 or not (identity or kind.startswith(through)):
            return False
        node = parents[0]
    return False


def mark_nonnegative(x: Tensor) -> None:
    """Note of a leaf of a pass (:func:`~tdhook.tape.dependence.leaf`) that none of its values is negative."""
    node: Any = x.grad_fn
    setattr(node.next_functions[0][0].variable, _MARK, True)
