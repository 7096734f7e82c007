"""Meeting: where elements of a batch depend on each other."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook.passes.forward import Run
from tdhook.passes.rows import is_close
from tdhook.tape.conditions import holds
from tdhook.targets.base import Seeds

__all__ = ["joint_axes"]

_GOLDEN = (5**0.5 - 1) / 2
"""The multiples of it lie apart from each other, but for whole numbers."""


def joint_axes(run: Run, seeds: Seeds, among: Iterable[NestedKey]) -> tuple[int, ...]:
    """The batch axes along which what is explained of one element depends on values of others.

    Where elements are independent, gradients of weighted elements are weighted gradients.

    Args:
        run: what a forward pass left behind.
        seeds: what is explained.
        among: the sources that are looked at.
    """
    own, batch, sources = run.td.batch_dims, run.td.batch_size, run.sources(among)
    axes = [axis for axis in range(own) if batch[axis] > 1]
    plain = run.pull(seeds, sources) if axes else {}
    found = []
    for axis in axes:
        count, after = batch[axis], seeds.several is not None
        # One for each element, by arithmetic alone, as a graph of any batch size needs it.
        weight = torch.arange(count, dtype=torch.float64) * _GOLDEN % 1 + 0.5

        def weighed(x: Tensor, at: int, weight: Tensor = weight) -> Tensor:
            return x * weight.to(x).reshape(-1, *(1,) * (x.dim() - at - 1))

        grads = [
            weighed(grad.reshape(*grad.shape[:after], *batch, -1), after + axis).reshape(grad.shape)
            for grad in seeds.grads
        ]
        pulled = run.pull(Seeds(seeds.keys, seeds.tensors, grads, seeds.several), sources)
        for key, grad in pulled.items():
            one, all_ = (run.in_batch_shape(key, x, sources[key]) for x in (grad, plain[key]))
            if not holds(is_close(one, weighed(all_, axis))):
                found.append(axis)
                break
    return tuple(found)
