"""Paths: gradients on the way from references to the input, summed with weights or step by step."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import TypeAlias

import torch
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook.contexts.compared import Compared
from tdhook.keys import under
from tdhook.passes.beside import Change
from tdhook.passes.forward import Run
from tdhook.passes.rows import some_rows
from tdhook.passes.variants import REACHED, Variants
from tdhook.tape.axes import beside

__all__ = ["Found", "Way", "along", "carried", "inputs", "pictures", "ways", "weighed"]

Found: TypeAlias = "dict[NestedKey, Tensor]"
"""Values by source."""


class Way:
    """Straight ways from references to the input.

    Args:
        starts: the references by source, ``[references, *source]``: one for all points, or one for each.
        ends: the input by source.
    """

    def __init__(self, starts: Mapping[NestedKey, Tensor], ends: Mapping[NestedKey, Tensor]) -> None:
        self.starts, self.ends = starts, ends

    def points(self, places: Sequence[float]) -> Found:
        """Points so far along, ``[points, *source]`` by source."""
        found = {}
        for key, x in self.ends.items():
            place = torch.tensor(places, dtype=x.dtype, device=x.device)
            found[key] = torch.lerp(self.starts[key], x, beside(place, x.unsqueeze(0)))
        return found

    def at(self, places: Sequence[float]) -> Change:
        """The variants that lie so far along."""
        return lambda numbers: self.points(places[numbers.start : numbers.stop])

    def shares(self, gradients: Mapping[NestedKey, Tensor]) -> Found:
        """The way times gradients ``[points, *source]`` or ``[points, outputs, *source]``, of the same shape."""
        found = {}
        for key, grad in gradients.items():
            way = self.ends[key] - self.starts[key]
            found[key] = (way.unsqueeze(1) if grad.dim() > way.dim() else way) * grad
        return found

    def among(self, rows: Tensor, count: int) -> Way:
        """The ways of some of ``count`` elements along the first batch axis."""
        ends = {key: some_rows(x, count, rows) for key, x in self.ends.items()}
        return Way({key: some_rows(x, count, rows, 1) for key, x in self.starts.items()}, ends)


def inputs(run: Run) -> Found:
    """The inputs, attributed or not, detached: where the way of a layer's input ends.

    Raises:
        ValueError: none of them comes from a baseline.
    """
    if not run.inputs:
        raise ValueError(
            f"none of the inputs ({', '.join(map(repr, run.setup.model.attributed))}) is floating-point, so that none "
            "comes from a baseline on the way of which a layer could have a part: explain the layer by "
            "IntegratedGradients(input_modules=...)"
        )
    return {key: x.detach() for key, x in run.inputs.items()}


def pictures(run: Run) -> Found:
    """Those of the values that are attributed, and depend on none of each other, that are pictures; detached.

    Raises:
        ValueError: none of them is.
    """
    sources = run.independent_sources()[0]
    dims = run.batch_dims(sources)
    found = {key: x for key, x in sources.items() if x.dim() >= dims[key] + 2}
    if not found:
        shapes = ", ".join(f"{key!r} {list(x.shape[dims[key] :])}" for key, x in sources.items())
        raise ValueError(
            f"no input is a picture, with at least two axes of features, that could be blurred: {shapes}"
        )
    return found


def ways(method: Compared, run: Run, ends: Mapping[NestedKey, Tensor]) -> Iterator[Way]:
    """The way from each of the references of a method, one after the other."""
    for number in range(method.samples):
        yield Way(method.starts(run, ends, range(number, number + 1)), ends)


def along(variants: Variants, way: Way, places: Sequence[tuple[float, float]]) -> Found:
    """The way from one reference times a weighted sum of gradients on it.

    Args:
        variants: asks the model.
        way: where to.
        places: how far along, and with what weight.

    Returns:
        By source, ``[*source]`` or ``[outputs, *source]``.
    """
    summed = weighed(variants, way, places)
    return {key: (way.ends[key] - way.starts[key][0]) * grad for key, grad in summed.items()}


def weighed(
    variants: Variants,
    way: Way,
    places: Sequence[tuple[float, float]],
    of: Iterable[NestedKey] | None = None,
) -> Found:
    """A weighted sum of gradients on the way from one reference, by source as :func:`along` gives them.

    Args:
        variants: asks the model.
        way: where to.
        places: how far along, and with what weight.
        of: the sources whose gradients are wanted; by default those that go the way.
    """
    far, weights = zip(*places, strict=True)
    return variants.summed(weights, way.at(far), list(way.ends) if of is None else of)


def carried(variants: Variants, count: int, change: Change, of: Collection[NestedKey]) -> Found:
    """What values pass on to the target where they change from point to point: ``sum of dh df/dh``.

    By the trapezoid rule: each step of a value, times the mean of the gradients at both ends of it.

    Args:
        variants: asks the model.
        count: how many points there are.
        change: makes them.
        of: the sources whose part is wanted, or inputs.

    Returns:
        By source, ``[*source]`` or ``[outputs, *source]``.
    """
    found: Found = {}
    last: Found = {}
    for answer in variants.gradients(count, change, of, reached=True):
        now = {key: torch.cat([last[key][None], x]) if last else x for key, x in answer.found.items()}
        last = {key: x[-1] for key, x in now.items()}
        for key in of:
            grad, value = now[key], now[under(REACHED, key)]
            step = value.diff(dim=0)
            step = step.unsqueeze(1) if grad.dim() > step.dim() else step
            share = (step * (grad[1:] + grad[:-1]) / 2).sum(0)
            found[key] = found[key] + share if key in found else share
    return found
