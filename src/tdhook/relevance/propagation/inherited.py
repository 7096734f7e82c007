"""Layers that derive from one of torch's and compute in their own way: what of it the layer of torch computes."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.conv import _ConvNd

from tdhook.models.parallel import is_of_torch
from tdhook.relevance.propagation.lent import are_lent
from tdhook.selectors.kinds import AFFINE, ELEMENTWISE, MOVES, NORMS, PRODUCTS, RECURRENT, TAYLOR, WINNER

__all__ = ["LINEAR", "MADE_OF_OTHERS", "inherited_operation"]

LINEAR = "linear"
"""Stands for all linear operations with weights: a layer may be written with any of them."""

MADE_OF_OTHERS = frozenset(
    [
        "cosine_similarity",
        "fold",
        "glu",
        "interpolate",
        "local_response_norm",
        "lp_pool1d",
        "lp_pool2d",
        "lp_pool3d",
        "multi_head_attention_forward",
        "pairwise_distance",
        "softmin",
    ]
)
"""Functions of layers of torch that have no rule by themselves, but one that is given to the layer."""

_OPERATIONS = AFFINE | ELEMENTWISE | MOVES | NORMS | PRODUCTS | RECURRENT | TAYLOR | WINNER
_OPERATIONS |= MADE_OF_OTHERS | {"identity", "softmax"}
_BY_CLASS = {name.replace("_", ""): name for name in _OPERATIONS}
_BY_CLASS |= {"multiheadattention": "multi_head_attention_forward", "upsample": "interpolate"}


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
        found = _operation_of(base.__name__.lower(), module)
        if base.__module__ == _PADDING:
            found = "pad"
        if found is not None:
            return found
    return None


_PADDING = "torch.nn.modules.padding"


def _operation_of(name: str, module: nn.Module) -> str | None:
    """The operation of a layer of torch, by the name of its class."""
    if name in ("rnn", "rnncell"):
        name = name.replace("rnn", f"rnn{getattr(module, 'nonlinearity', 'tanh')}")
    return _BY_CLASS.get(name) or _BY_CLASS.get(name.rstrip("123d"))
