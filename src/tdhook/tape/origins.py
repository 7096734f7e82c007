"""What made a value, as far as the tape tells."""

from __future__ import annotations

import re
from collections.abc import Set
from functools import cache
from typing import Any

from torch import Tensor

from tdhook.tape.functions import is_identity, unwrapped
from tdhook.tape.internals import maker_of, version_of

__all__ = ["is_nonnegative", "made_by", "mark_nonnegative", "written_over"]

# What a gate may go through and stay one: 1 - gate, and moving it about.
_MOVED = (
    "(?:Unsafe)?Split(?:WithSizes)?|Unbind|Select|Slice|(?:Unsafe)?View|ReshapeAlias|Unsqueeze|Squeeze|Expand"
    "|Transpose|Permute|T|Alias|Clone|ToCopy"
)
_KEEPS_GATE = f"{_MOVED}|Rsub|Sub"
# Bicubic interpolation has weights that are negative.
_KEEPS_SIGN = (
    f"{_MOVED}|(?:Adaptive)?(?:Max|Avg)Pool\\w*|Mean|Sum|Upsample(?:Nearest|Linear|Bilinear|Trilinear)\\w*"
)
_COPIES = "CopyBackwards"
_MARK = "_nonnegative"
_NONNEGATIVE = frozenset(
    ("abs", "exp", "relu", "relu6", "sigmoid", "hardsigmoid", "softmax", "softplus", "sqrt")
)


def made_by(x: Tensor, names: Set[str]) -> bool:
    """Whether one of these operations made ``x``, or what ``x`` was taken from, or one minus it."""
    return _made_by(x, names, _KEEPS_GATE)


def is_nonnegative(x: Tensor) -> bool:
    """Whether ``x`` cannot be negative, since a ReLU made it, say, and nothing was written to it since."""
    return version_of(unwrapped(x)) == 0 and _made_by(x, _NONNEGATIVE, _KEEPS_SIGN, marked=True)


def _made_by(x: Tensor, names: Set[str], through: str, marked: bool = False) -> bool:
    node: Any = unwrapped(x).grad_fn
    while node is not None:
        kind = type(node).__name__
        made = maker_of(node)
        maker = kind if made is None else getattr(node, "made_by", kind)
        if not marked:  # a gate is one whoever wrote it
            maker = maker.rpartition(".")[2]
        if maker.removesuffix("Backward0").lower() in names:
            return True
        if marked and hasattr(getattr(node, "variable", None), _MARK):
            return True
        parents = [parent for parent, _ in node.next_functions if parent is not None]
        if kind == _COPIES:  # what is overwritten is of no account
            parents = parents[-1:]
        if len(parents) != 1 or not (is_identity(node) or _is_of(kind, through)):
            return False
        node = parents[0]
    return False


def written_over(node: Any) -> Any:
    """The node of what was written over all of a value, if that made the value; else ``None``."""
    return node.next_functions[-1][0] if type(node).__name__ == _COPIES else None


@cache
def _is_of(kind: str, names: str) -> bool:
    """Whether a node of the tape is of one of these kinds, which a pattern tells."""
    return re.fullmatch(f"(?:{names})Backward\\d+|{_COPIES}", kind) is not None


def mark_nonnegative(x: Tensor) -> None:
    """Note of a leaf of a pass (:func:`~tdhook.tape.dependence.leaf`) that none of its values is negative."""
    node: Any = x.grad_fn
    setattr(node.next_functions[0][0].variable, _MARK, True)
