"""Sparse tensors, which hold some of their elements alone, and nested ones, whose rows are of any length.

As constants they take part in products as any matrix does. Where they depend on what is explained, no rule can follow:
what they are computed of and into are no tensors with an element at each place.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tdhook.tape.internals import components_of, is_plain
from tdhook.tape.trees import tree_leaves

__all__ = ["SPARSE", "Live", "at_fault", "equal"]

SPARSE = frozenset((torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc))
"""Their layouts."""


class Live(NotImplementedError):
    """A sparse or nested tensor depends on what is explained.

    Args:
        x: the tensor.
        operation: which reads or makes it.
        path: of the module in which it runs.
    """

    def __init__(self, x: Tensor, operation: str = "", path: str = "") -> None:
        self.x = x
        by = f"`{operation}` in module `{path or '(model)'}`" if operation else "the model"
        what = "nested tensor" if x.is_nested else f"sparse tensor ({list(x.shape)}, {x.layout})"
        super().__init__(
            f"{by} makes or reads a {what} that depends on what is explained, and no rule follows what is computed of "
            "one; make a dense one there (by `index_put`, `scatter_add`, `where`, say, or padded; to make it dense "
            "again comes too late), or explain by a method that takes gradients or outputs alone"
        )


def at_fault(error: RuntimeError, tree: object) -> Tensor | None:
    """The sparse or nested tensor for whose sake torch does not compute something; ``None`` if for another reason.

    Args:
        error: what torch raised.
        tree: what it was given.
    """
    if isinstance(error, Live | torch.OutOfMemoryError):
        return None
    layouts = SPARSE if isinstance(error, NotImplementedError) else ()
    tensors = (x for x in tree_leaves(tree) if isinstance(x, Tensor))
    return next((x for x in tensors if x.is_nested or x.layout in layouts), None)


def equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same values, some of which may be no numbers; sparse ones, in the same order."""
    if is_plain(one) and is_plain(other):
        return _equal(one, other)
    if one.layout is not other.layout or one.is_nested is not other.is_nested:
        return False
    parts, others = components_of(one), components_of(other)
    return len(parts) == len(others) and all(map(_equal, parts, others))


def _equal(one: Tensor, other: Tensor) -> bool:
    if torch.equal(one, other):
        return True
    if one.shape != other.shape:
        return False
    missing = one.isnan()
    return torch.equal(missing, other.isnan()) and torch.equal(one[~missing], other[~missing])
