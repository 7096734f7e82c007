"""Copies that lie in memory as what they are made of.

How a kernel computes depends on how its arguments lie, and the last bits of what it computes on that: a product of
expanded values is another one than that of the same values written out. ``Tensor.clone`` closes gaps and writes out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tdhook.tape.internals import transformed, without_modes

__all__ = ["clones", "copied"]

_PLAIN = (Tensor, nn.Parameter)
_ALIGNED = 64  # bytes


def clones(x: Tensor) -> bool:
    """Whether ``clone`` keeps how a tensor lies, or is all that can be had: of batches of tensors, and in graphs."""
    if x.numel() < 2 or type(x) not in _PLAIN or x.layout is not torch.strided:
        return True
    if transformed() or torch.compiler.is_compiling():
        return True
    return x.is_contiguous() and x.storage_offset() % _unit(x) == 0


def copied(x: Tensor) -> Tensor:
    """A copy off the tape that is no view, but expanded where ``x`` is, and with gaps where that has some.

    Gaps are as small as the alignment of ``x`` allows: a copy of one row of a large tensor takes the memory of a row.
    """
    if clones(x):
        return x.detach().clone()
    with torch.no_grad(), without_modes():
        own, unit = x.stride(), _unit(x)
        strides = _closer(x.shape, own, unit)
        if strides is None:
            copy = _empty(x, own, unit)
            span = [_span(x.shape, own)]
            copy.as_strided(span, [1]).copy_(x.as_strided(span, [1]))
            return copy
        copy = _empty(x, strides, unit)
        once = [count if stride else 1 for count, stride in zip(x.shape, own, strict=True)]
        copy.as_strided(once, strides).copy_(x.as_strided(once, own))
        return copy


def _unit(x: Tensor) -> int:
    """How many values of a tensor lie between places that are equally aligned."""
    return max(_ALIGNED // x.element_size(), 1)


def _span(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Over how many values a tensor extends."""
    return 1 + sum((count - 1) * stride for count, stride in zip(shape, strides, strict=True))


def _empty(like: Tensor, strides: Sequence[int], unit: int) -> Tensor:
    """A tensor with memory of its own, aligned alike."""
    offset = like.storage_offset() % unit
    memory = like.new_empty(offset + _span(like.shape, strides))
    return like.new_empty(0).set_(memory.untyped_storage(), offset, like.shape, strides)


def _closer(shape: Sequence[int], strides: Sequence[int], unit: int) -> list[int] | None:
    """Strides with smaller gaps between the same axes, and the same remainder by ``unit``.

    ``None`` where axes reach into each other, as those of windows that overlap do.
    """
    made = list(strides)
    reach = kept = 1
    axes = [axis for axis, count in enumerate(shape) if count > 1 and strides[axis] > 0]
    for axis in sorted(axes, key=strides.__getitem__):
        stride = strides[axis]
        if stride < reach:
            return None
        made[axis] = kept if stride == reach else kept + 1 + (stride - kept - 1) % unit
        reach, kept = stride * shape[axis], made[axis] * shape[axis]
    return made
