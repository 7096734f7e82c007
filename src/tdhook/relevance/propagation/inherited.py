"""Layers that derive from one of torch's and compute in their own way: what of it the layer of torch computes."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.conv import _ConvNd

from tdhook.models.parallel import is_of_torch
from tdhook.relevance.propagation.lent import are_lent
from tdhook.selectors.kinds import AFFINE, ELEMENTWISE, MOVES, NORMS, PRODUCTS, RECURRENT, TAYLOR, WINNER

__all__ = ["LINEAR", "inherited_operation"]

LINEAR = "linear"
"""Stands for all linear operations with weights: a layer may be written with any of them."""

_OPERATIONS = AFFINE | ELEMENTWISE | MOVES | NORMS | PRODUCTS | RECURRENT | TAYLOR | WINNER
_OPERATIONS |= {"identity", "softmax"}
_BY_CLASS = {name.replace("_", ""): name for name in _OPERATIONS}


def inherited_operation(module: nn.Module) -> str | None:
    """The operation of the layer of torch that ``module`` derives from, if it computes in its own way.

    ``None`` for what computes as that layer does, with weights that are brought for each call too, for what derives
    from none, and from one without an operation of its name.
    """
    if is_of_torch(module) or are_lent(module):
        return None
    for base in type(module).__mro__:
        if not base.__module__.startswith("torch.nn.modules."):
            continue
        if issubclass(base, nn.Linear | _ConvNd):
            return LINEAR
        name = base.__name__.lower()
        return _BY_CLASS.get(name) or _BY_CLASS.get(name.rstrip("123d"))
    return None
