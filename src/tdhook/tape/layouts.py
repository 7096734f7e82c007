"""Layouts: what torch's batch norm keeps for its backward pass, and the gradient it is given, lie in memory alike.

On a CPU its backward pass goes through memory as the layout of the one says, and reads the other likewise. Where an
axis of size one leaves open which layout that is (a single frame whose channels were moved to the front, a map one
pixel wide), it takes two that differ for the same, and the gradient is that of other elements. Here values and shapes
stay, and only where a shape leaves the layout open anything is copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from torch import Tensor
from torch.autograd.graph import Node

from tdhook.tape.functions import nodes_behind
from tdhook.tape.internals import gradients_of, input_kept_by

__all__ = ["lay_out"]

_NODE = "NativeBatchNormBackward0"
_DONE = "laid_out"


def lay_out(nodes: Iterable[Node | None]) -> bool:
    """See to it at some nodes of the tape, and at all that lead there.

    Returns:
        Whether there is any batch norm.
    """
    found = False
    node: Any
    for node in nodes_behind(nodes):
        if node.name() == _NODE:
            found = True
            if _DONE not in node.metadata and _is_open(gradients_of(node)[0][0]):
                _lay_out(node)
    return found


def _lay_out(node: Any) -> None:
    node.metadata[_DONE] = True
    try:
        input_kept_by(node).register_hooks(_in_order, _itself)
    except RuntimeError:  # what is kept is made once more, as in a checkpoint, and lies as it lies
        node.register_prehook(partial(_of_the_first, _with_gaps))
    else:
        node.register_prehook(partial(_of_the_first, _in_order))


def _in_order(x: Tensor) -> Tensor:
    """The same values, one axis after the other."""
    return x if x.device.type != "cpu" else x.reshape(-1).view(x.shape)


def _with_gaps(x: Tensor) -> Tensor:
    """The same values, laid out as nothing is that torch's faster ways through memory are for."""
    if x.device.type != "cpu":
        return x
    return x.new_empty(*x.shape[:-1], x.shape[-1] + 1)[..., :-1].copy_(x)


def _of_the_first(
    lay: Callable[[Tensor], Tensor], grads: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    first, *others = grads
    return (None if first is None else lay(first), *others)


def _itself(x: Tensor) -> Tensor:
    return x


def _is_open(shape: Sequence[int]) -> bool:
    return len(shape) > 3 and (shape[0] == 1 or 1 in shape[2:])
