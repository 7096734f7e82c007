"""Order: whether a model that makes several axes of the batch one leaves the elements in their order.

A network of convolutions does so by itself, to run on batches of any shape. What its layers give then has elements of
``[B, T]`` in one line, and where it had put time first they would be taken for others.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import permutations

import torch
from tensordict.utils import NestedKey
from torch import Size, Tensor

from tdhook.passes.axes import Axes
from tdhook.passes.backward import PullBack
from tdhook.targets.base import Seeds

__all__ = ["look_at_order", "pulled_of"]


def look_at_order(
    axes: Axes,
    pull_back: PullBack,
    seeds: Seeds,
    inputs: Mapping[NestedKey, Tensor],
    modules: Mapping[str, Tensor],
    batch: Size,
) -> None:
    """See that elements lie in their order in outputs of modules that have several axes of the batch as one.

    Elements are told by the inputs that they depend on; where no input is on the tape, by what is explained of each.

    Args:
        axes: knows of which outputs it was seen.
        pull_back: runs backward passes.
        seeds: what is explained.
        inputs: leaves of the graph, ``[*batch, ...]``.
        modules: outputs by path and call.
        batch: the batch size.

    Raises:
        ValueError: they do not.
    """
    for name, z in axes.folded(modules, batch).items():
        amounts: dict[int, Tensor] = {}
        if inputs:
            for number in _telling(batch):
                grad = torch.zeros_like(z)
                grad[number] = 1
                pulled = pull_back(Seeds([], [z], [grad]), list(inputs.values()), keep=True)
                amounts[number] = _by_element([x for x in pulled if x is not None], batch.numel())
        elif all(x.shape[: len(batch)] == batch for x in seeds.tensors):
            for number in _telling(batch, _is_explained(seeds, batch)):
                at = tuple(int(i) for i in torch.unravel_index(torch.tensor(number), batch))
                there = pulled_of(pull_back, seeds, at, {name: z})[name]
                amounts[number] = _by_element([] if there is None else [there], batch.numel())
        axes.see_order(name, z.shape, batch, amounts)


def pulled_of(
    pull_back: PullBack, seeds: Seeds, element: tuple[int, ...], values: Mapping[str, Tensor]
) -> dict[str, Tensor | None]:
    """What is explained of one element of the batch alone, pulled back to some values; the first of several outputs."""
    if not values:
        return {}
    grads = [torch.zeros_like(z) for z in seeds.tensors]
    lead = (0, *element) if seeds.several is not None else element
    for only, grad in zip(grads, seeds.grads, strict=True):
        only[element] = grad[lead]
    pulled = pull_back(Seeds(seeds.keys, seeds.tensors, grads), list(values.values()), keep=True)
    return dict(zip(values, pulled, strict=True))


def _by_element(values: list[Tensor], count: int) -> Tensor:
    """The size of what belongs to each element, ``[elements]``."""
    each = [x.detach().abs().reshape(count, -1).sum(-1).cpu().double() for x in values]
    return sum(each, torch.zeros(count, dtype=torch.float64))


def _is_explained(seeds: Seeds, batch: Size) -> Tensor:
    """Of which elements something is explained, of the first of several outputs, ``[*batch]`` truth values."""
    found = torch.zeros(batch, dtype=torch.bool)
    for grad in seeds.grads:
        first = grad if seeds.several is None else grad[0]
        found |= (first != 0).reshape(*batch, -1).any(-1).cpu()
    return found


def _telling(batch: Size, among: Tensor | None = None) -> list[int]:
    """The numbers of elements whose places tell in which order the axes of the batch were made one, at most two.

    Args:
        batch: the batch size.
        among: elements that are asked about, ``[*batch]`` truth values; by default all.
    """
    number = torch.arange(batch.numel())
    telling = torch.ones_like(number, dtype=torch.bool) if among is None else among.reshape(-1)
    for order in permutations(range(len(batch))):
        other = torch.empty_like(number)
        other[number.reshape(batch).permute(order).reshape(-1)] = number
        if not torch.equal(other, number):
            telling = telling & (other != number)
    found = telling.nonzero().flatten().tolist()
    return sorted({found[0], found[-1]}) if found else []
