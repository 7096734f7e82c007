"""Sums of gradients over many variants: what all of them go back through alike is gone through once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

import torch
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook.passes.finite import are_finite
from tdhook.passes.forward import Run
from tdhook.passes.rows import is_close
from tdhook.tape.conditions import is_traced
from tdhook.tape.fronts import Front
from tdhook.targets.base import Seeds

__all__ = ["Summing"]

Found: TypeAlias = "dict[NestedKey, Tensor]"

# Values of sources over all variants from which it takes longer to go back to them than to look for a front.
_FEW = 2**15
# Values that go into each that comes out of a layer, from which it takes longer to go through than to sum behind it.
_NARROW = 64


class Summing:
    """A weighted sum of the gradients of variants, by source.

    Gradients are summed where the front of the tape ends (:class:`~tdhook.tape.fronts.Front`), and the sum goes on from
    there on the tape of the run on the batch as it is. Each run of variants is looked at: where its front is another
    one, its gradients go all the way. The first time they go both ways, which have to come to the same.

    Args:
        run: that run.
        seeds: what is explained of it.
        count: how many variants there are.
        of: the sources whose gradients are wanted.
        directly: whether gradients go all the way, whatever the front.

    Attributes:
        shapes: of what is found that is none of a source.
    """

    def __init__(
        self, run: Run, seeds: Seeds, count: int, of: Iterable[NestedKey], *, directly: bool = False
    ) -> None:
        self._run, self._seeds = run, seeds
        self._sources = run.sources(of)
        values = count * sum(x.numel() for x in self._sources.values())
        self._front: Front | None = None
        self.shapes: dict[NestedKey, torch.Size] = {}
        directly = directly or run.setup.fronts.trusted is False or seeds.several == 0 or is_traced()
        if values >= _FEW and not directly:
            front = Front.of(seeds.tensors, list(self._sources.values()))
            if front is not None and front.breadth >= _NARROW:
                self._front = front
                self.shapes = {_at(number): shape for number, shape in enumerate(front.shapes)}
        self._sums: Found = {}

    def pulled(self, run: Run, seeds: Seeds, copies: int) -> Found:
        """What arrives of so many copies of the batch at the end of the front, or at sources.

        Args:
            run: the run on them.
            seeds: what is explained of it.
            copies: how many there are.
        """
        sources = run.sources(self._sources)
        front = None if self._front is None else Front.of(seeds.tensors, list(sources.values()))
        if front is None or self._front is None or not front.is_as(self._front, copies):
            return run.pull(seeds, sources)
        if not all(z.requires_grad for z in seeds.tensors):
            return run.pull(seeds, sources)
        run.look_at_axes(seeds)
        arrived = run.setup.pull_back(seeds, front.edges, keep=True)
        if any(x is None for x in arrived) or not are_finite(arrived):
            return run.pull(seeds, sources)
        found = {_at(number): x.detach() for number, x in enumerate(arrived) if x is not None}
        if run.setup.fronts.trusted is None:
            found.update(run.pull(seeds, sources))
        return found

    def add(self, found: Mapping[NestedKey, Tensor], weights: Sequence[float]) -> None:
        """Add what :meth:`pulled` gave of each of some variants, ``[variants, ...]`` by key."""
        sums = {}
        for key, value in found.items():
            weight = torch.tensor(weights, dtype=value.dtype, device=value.device)
            sums[key] = torch.tensordot(weight, value, 1)
        inside = {key: value for key, value in sums.items() if key in self.shapes}
        if inside and len(sums) > len(
            inside
        ):  # both ways: the first call gives what later ones give, to the last bit
            there = self._onward(inside)
            same = all(bool(is_close(there[key], sums[key])) for key in there)
            self._run.setup.fronts.trusted = same
            if not same:
                self._front = None
            sums = inside if same else {key: sums[key] for key in there}
        for key, value in sums.items():
            self._sums[key] = self._sums[key] + value if key in self._sums else value

    def total(self) -> Found | None:
        """The sum, ``[*source]`` or ``[outputs, *source]`` by source; ``None`` where it is not finite."""
        inside = {key: value for key, value in self._sums.items() if key in self.shapes}
        found = {key: value for key, value in self._sums.items() if key not in inside}
        behind = self._onward(inside) if inside else {}
        if not are_finite(list(behind.values())):
            return None
        for key, value in behind.items():
            found[key] = found[key] + value if key in found else value
        return {key: found[key] for key in self._sources}

    def _onward(self, inside: Mapping[NestedKey, Tensor]) -> Found:
        """What arrives at the sources of what is at the end of the front."""
        assert self._front is not None
        edges, sources = self._front.edges, list(self._sources.values())
        grads = [inside[_at(number)] for number in range(len(edges))]
        pull_back = self._run.setup.pull_back
        arrived = pull_back.between(edges, grads, sources, self._seeds.several, keep=True)
        lead = () if self._seeds.several is None else (self._seeds.several,)
        return {
            key: x.new_zeros((*lead, *x.shape)) if grad is None else grad.detach()
            for (key, x), grad in zip(self._sources.items(), arrived, strict=True)
        }


def _at(number: int) -> tuple[str, str]:
    """Where what arrives at an end of the front is found."""
    return ("front", str(number))
