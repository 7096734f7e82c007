"""Order: whether a model leaves the elements of a batch in their order.

A network of convolutions does so by itself, to run on batches of any shape. What its layers give then has elements of
``[B, T]`` in one line, and where it had put time first they would be taken for others. So they would be where a model
sorts its batch by length, say, or hands some of its rows to an expert, and these are as many as there are elements.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import permutations

import torch
from tensordict.utils import NestedKey
from torch import Size, Tensor

from tdhook.passes.axes import Axes
from tdhook.passes.backward import PullBack
from tdhook.tape.axes import beside
from tdhook.tape.picking import Rows, rows_of
from tdhook.targets.base import Seeds

__all__ = ["look_at_order", "look_at_rows", "pulled_of"]

# Rows that are looked at, where some seem to be of other elements.
_LOOKED_AT = 3


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


def look_at_rows(
    axes: Axes,
    pull_back: PullBack,
    seeds: Seeds,
    inputs: Mapping[NestedKey, Tensor],
    values: Mapping[str, Tensor],
    batch: Size,
    passed: Collection[str],
) -> None:
    """See that rows of values are elements of the batch at their own places.

    Where the model indexes rows, that is seen in each call. A row is somewhere else if what is explained of the element
    of that place has nothing to do with it, and it has nothing to do with the inputs of that element.

    Args:
        axes: knows of which values there is nothing to be seen.
        pull_back: runs backward passes.
        seeds: what is explained.
        inputs: leaves of the graph, ``[*batch, ...]``.
        values: outputs by path and call, or operation, with the axes of the batch in front, or with one for all.
        batch: the batch size.
        passed: names of values that may have rows elsewhere.

    Raises:
        ValueError: they are not.
    """
    count, dims = batch.numel(), len(batch)
    new = [name for name in values if name not in axes.rows]
    if new:
        axes.rows.update(dict.fromkeys(new, rows_of(seeds.tensors, count)))
    looked = {
        name: z
        for name, z in values.items()
        if (axes.rows[name] is Rows.PICKED or (name in new and axes.rows[name] is Rows.MOVED))
        and (z.shape[:dims] == batch or z.shape[:1] == (count,))
    }
    if not looked or any(x.shape[:dims] != batch for x in seeds.tensors):
        return
    weight = (torch.rand(count, generator=torch.Generator().manual_seed(0)) + 0.5).reshape(batch)
    grads = seeds.grads if seeds.several is None else [grad[0] for grad in seeds.grads]
    inside = {name: z for name, z in looked.items() if not any(z is x for x in seeds.tensors)}
    arrives = Seeds([], seeds.tensors, grads)
    found = _unlike_weighed(pull_back, arrives, list(inside.values()), weight) if inside else []
    unlike = dict(zip(inside, found, strict=True))
    for name, z in looked.items():
        explained = name not in inside
        if explained and not inputs:
            continue
        if explained:
            begun = Seeds([], [z], [torch.ones_like(z)])
            unlike[name] = torch.stack(_unlike_weighed(pull_back, begun, list(inputs.values()), weight)).any(
                0
            )
        odd = unlike[name].nonzero().flatten().tolist()
        some = sorted({odd[i * (len(odd) - 1) // (_LOOKED_AT - 1)] for i in range(_LOOKED_AT)}) if odd else []
        elsewhere = any(
            (explained or not _is_reached(pull_back, seeds, z, number, batch))
            and not _reaches(pull_back, inputs, z, number, batch)
            for number in some
        )
        axes.see_rows(name, z, batch, elsewhere=elsewhere, asked=name not in passed)


def _unlike_weighed(pull_back: PullBack, seeds: Seeds, ends: list[Tensor], weight: Tensor) -> list[Tensor]:
    """At which elements of each end something else arrives than what is weighted, if what begins at each is weighted.

    Where elements lie at their own places, and leave others alone, there are none.
    """
    heavy = [grad * beside(weight.to(grad), grad) for grad in seeds.grads]
    plain, weighed = (
        pull_back(Seeds([], seeds.tensors, some), ends, keep=True) for some in (seeds.grads, heavy)
    )
    count = weight.numel()
    odd = [torch.zeros(count, dtype=torch.bool) for _ in ends]
    for i, (a, b) in enumerate(zip(plain, weighed, strict=True)):
        if a is not None and b is not None:
            a, b = (x.detach().reshape(count, -1) for x in (a, b))
            apart = (b - a * weight.reshape(-1, 1).to(a)).abs().amax(-1)
            odd[i] = (apart > torch.finfo(a.dtype).eps ** 0.5 * b.abs().amax()).cpu()
    return odd


def _is_reached(pull_back: PullBack, seeds: Seeds, z: Tensor, number: int, batch: Size) -> bool:
    """Whether what is explained of an element has to do with the row of its number, or with none."""
    at = tuple(int(i) for i in torch.unravel_index(torch.tensor(number), batch))
    there = pulled_of(pull_back, seeds, at, {"": z})[""]
    amount = _by_element([] if there is None else [there], batch.numel())
    return not amount.any() or bool(amount[number] != 0)


def _reaches(
    pull_back: PullBack, inputs: Mapping[NestedKey, Tensor], z: Tensor, number: int, batch: Size
) -> bool:
    """Whether a row of a value has to do with the inputs of the element of its number."""
    grad = torch.zeros_like(z, memory_format=torch.contiguous_format)
    grad.reshape(batch.numel(), -1)[number] = 1
    pulled = pull_back(Seeds([], [z], [grad]), list(inputs.values()), keep=True) if inputs else []
    return bool(_by_element([x for x in pulled if x is not None], batch.numel())[number] != 0)


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
