"""Apart: along which axes of the batch elements have nothing to do with each other, as seen where some are replaced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook.passes.beside import Change
from tdhook.passes.rows import parting
from tdhook.passes.variants import Variants
from tdhook.perturbing.players import Known
from tdhook.tape.conditions import holds, is_traced
from tdhook.targets.base import Seeder
from tdhook.targets.time import AtStep, time_axis

__all__ = ["Learnt", "apart", "axes_given", "look"]


@dataclass
class Learnt:
    """What is kept of an explained module from call to call.

    Attributes:
        together: axes of the batch along which elements were seen to depend on each other.
        known: features that were numbered.
        pairs: batch axes, axis and size for which each pair of elements was looked at.
    """

    together: tuple[int, ...] = ()
    pairs: set[tuple[int, int, int]] = field(default_factory=set)
    known: Known = field(default_factory=Known)


def axes_given(td: TensorDictBase, batch_dims: int | None, target: Seeder) -> tuple[int, ...]:
    """The axes of the batch that may tell elements apart: all, or all but time where one step is explained.

    Raises:
        ValueError: the batch does not have as many axes as are asked for.
    """
    if batch_dims is None:
        time = time_axis(td, target.time_dim) if isinstance(target, AtStep) else None
        return tuple(axis for axis in range(td.batch_dims) if axis != time)
    if not 0 <= batch_dims <= td.batch_dims:
        raise ValueError(
            f"batch_dims={batch_dims} of a TensorDict of batch size {list(td.batch_size)}: give 0 to {td.batch_dims}"
        )
    return tuple(range(batch_dims))


def apart(
    variants: Variants,
    ends: Mapping[NestedKey, Tensor],
    start: Mapping[NestedKey, Tensor],
    axes: Sequence[int],
    learnt: Learnt,
) -> tuple[tuple[int, ...], Tensor | None]:
    """The axes of the batch along which elements have nothing to do with each other.

    Some of the elements along each axis are replaced by the reference: the others must keep their values, and these
    have those of a batch that is all reference. The first time there are sets that have each element and not another
    one, for each pair; then it is half of them.

    Args:
        variants: asks the model.
        ends: the values, by source.
        start: the reference, by source.
        axes: those in question.
        learnt: is told of those along which they depend on each other, and asked while a graph is traced.

    Returns:
        The axes; and the target on the reference, ``[*batch]`` or ``[outputs, *batch]``, if it was asked for.

    Raises:
        ValueError: the model does not answer the same to the same.
    """
    large = sum(x.numel() for x in start.values()) > variants.looked_at
    if large:  # more variants than are looked at one by one
        look(variants, ends, start)
    alone, empty = _seen_apart(variants, ends, start, axes, learnt)
    if not large and variants.batch and 0 not in alone and not is_traced():
        look(variants, ends, start)  # where elements look at each other, variants may
    return alone, empty


def _seen_apart(
    variants: Variants,
    ends: Mapping[NestedKey, Tensor],
    start: Mapping[NestedKey, Tensor],
    axes: Sequence[int],
    learnt: Learnt,
) -> tuple[tuple[int, ...], Tensor | None]:
    """The same, whether or not variants look at each other."""
    batch, device = variants.batch, variants.values.device
    variants.meeting = 0 in learnt.together
    if is_traced():
        axes = [axis for axis in axes if axis not in learnt.together]
    looked = [axis for axis in axes if batch[axis] > 1]
    if not looked:
        return tuple(axes), None
    chosen, along = [torch.ones(batch, dtype=torch.bool, device=device)], []
    for axis in looked:
        for some in _sets(
            batch[axis], device, pairs=not is_traced() and _place(batch, axis) not in learnt.pairs
        ):
            chosen.append(some.reshape(-1, *(1,) * (len(batch) - axis - 1)).expand(batch))
            along.append(axis)
    values = _replaced(variants, ends, start, torch.stack(chosen))
    empty, together = values[0], []
    size = torch.maximum(variants.values.abs(), empty.abs())
    for axis, where, found in zip(along, chosen[1:], values[1:], strict=True):
        if axis not in together and not holds(
            _close(found, torch.where(where, empty, variants.values), size)
        ):
            together.append(axis)
    if together:
        nothing = torch.zeros((2, *batch), dtype=torch.bool, device=device)
        again = _replaced(variants, ends, start, nothing)
        if not holds(_close(again, variants.values.expand_as(again), variants.values.abs())):
            raise ValueError(
                "the model does not answer the same to the same input, so that what replaced features change cannot be "
                "seen: it draws random numbers of its own, or counts its calls; call eval() on it, or take that out"
            )
    if not is_traced():
        learnt.together = tuple(together)
        variants.meeting = 0 in together
        learnt.pairs.update(_place(batch, axis) for axis in looked if axis not in together)
    return tuple(axis for axis in axes if axis not in together), empty


def _replaced(
    variants: Variants,
    ends: Mapping[NestedKey, Tensor],
    start: Mapping[NestedKey, Tensor],
    chosen: Tensor,
) -> Tensor:
    """The target where chosen elements, ``[variants, *batch]``, are those of the reference."""

    def changed(numbers: range) -> dict[NestedKey, Tensor]:
        some = chosen[numbers.start : numbers.stop]
        found = {}
        for key, other in start.items():
            x = ends[key]
            dims = len(variants.batch)
            where = some if x.shape[:dims] == variants.batch else some.flatten(1)
            where = where.reshape((*where.shape, *(1,) * (x.dim() + 1 - where.dim())))
            found[key] = torch.where(where, other.detach(), x.detach())
        return found

    # One after the other: side by side they would be taken to leave each other alone, as is yet to be seen.
    one_by_one = [partial(_one_of, changed, number) for number in range(len(chosen))]
    return torch.cat([answer.values for one in one_by_one for answer in variants.answers(1, one)])


def look(variants: Variants, ends: Mapping[NestedKey, Tensor], start: Mapping[NestedKey, Tensor]) -> None:
    """See whether variants leave each other alone, by two that have half of the entries replaced each.

    A variant in which one entry is replaced tells little of it: the next one may look at another.
    """

    def halves(numbers: range) -> dict[NestedKey, Tensor]:
        found = {}
        for key, other in start.items():
            (half,) = _sets(other.numel(), other.device, pairs=False)
            where = torch.stack([half, ~half])[numbers.start : numbers.stop].reshape(-1, *other.shape)
            found[key] = torch.where(where, other.detach(), ends[key].detach())
        return found

    for _ in variants.answers(2, halves):
        pass


def _one_of(changed: Change, number: int, numbers: range) -> Mapping[NestedKey, Tensor]:
    """A change of one variant, which is a number of another change."""
    return changed(range(number, number + 1))


def _place(batch: torch.Size, axis: int) -> tuple[int, int, int]:
    return len(batch), axis, batch[axis]


def _sets(count: int, device: torch.device, *, pairs: bool) -> list[Tensor]:
    """Sets of so many places: two for each bit, so that each is in one that another is not; or about half, at random.

    The same in each call. Of the half, the second place is one, and the first is none.
    """
    if pairs:
        return parting(count, device)
    place = torch.arange(count, device=device)
    return [((place * place + place) * 2654435761 >> 15) % 2 == 1]


def _close(a: Tensor, b: Tensor, size: Tensor) -> Tensor:
    """Whether values are equal but for rounding, which goes by the largest of them."""
    reach: float = torch.finfo(a.dtype).eps ** (2 / 3)
    return torch.le((a - b).abs(), reach * size.amax())
