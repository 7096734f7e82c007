"""Axes: those that are added to go with others, and where on the tape an axis was before its values were moved."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from torch import Tensor

from tdhook.tape.internals import noted_by

__all__ = ["before_moves", "beside"]

_RESHAPES = frozenset(
    (
        *("ViewBackward0", "ReshapeAliasBackward0", "UnsafeViewBackward0"),
        *("SqueezeBackward0", "SqueezeBackward1", "SqueezeBackward2"),
    )
)
_COPIES = frozenset(("CloneBackward0",))


def beside(batch: Tensor, x: Tensor) -> Tensor:
    """Values of batch elements, ``[*batch]``, with axes added to go with ``x [*batch, *features]``."""
    return batch.reshape((*batch.shape, *(1,) * (x.dim() - batch.dim())))


def before_moves(node: Any, axis: int, shape: Sequence[int]) -> tuple[Any, int, Sequence[int]] | None:
    """Where an axis was before values were moved last, as reshaping, transposing and copying do.

    Args:
        node: what made the tensor.
        axis: of the tensor, not negative.
        shape: of the tensor.

    Returns:
        The node that made what was moved, the axis there, and the shape; ``None`` where the node moves nothing, or does
        not keep the axis in one piece.
    """
    name = type(node).__name__
    before = node.next_functions[0][0] if getattr(node, "next_functions", ()) else None
    if before is None:
        return None
    if name in _COPIES:
        return before, axis, shape
    if name in _RESHAPES:
        sizes = tuple(noted_by(node, "self_sym_sizes"))
        at = (
            i for i, size in enumerate(sizes) if size == shape[axis] and prod(sizes[:i]) == prod(shape[:axis])
        )
        old = next(at, None)
        return None if old is None else (before, old, sizes)
    if name == "UnsqueezeBackward0":
        new = _signed(noted_by(node, "dim")) % len(shape)
        return None if axis == new else (before, axis - (axis > new), [*shape[:new], *shape[new + 1 :]])
    if name in ("TransposeBackward0", "TBackward0"):
        order = list(range(len(shape)))
        dims = (noted_by(node, key) for key in ("dim0", "dim1")) if name != "TBackward0" else (0, -1)
        first, second = map(_signed, dims)
        order[first], order[second] = order[second], order[first]
    elif name == "PermuteBackward0":
        order = [_signed(dim) % len(shape) for dim in noted_by(node, "dims")]
    else:
        return None
    return before, order[axis], [shape[order.index(old)] for old in range(len(shape))]


def _signed(dim: int) -> int:
    """An axis as a call gave it, that counted from behind if it did: nodes note a large number then."""
    return dim - 2**64 if dim >= 2**63 else dim
