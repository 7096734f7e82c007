"""Kept runs: what a model does on a reference is not computed again while nothing changes that it depends on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from tensordict.utils import NestedKey
from torch import Tensor, nn

from tdhook.models.holding import held_by
from tdhook.models.state import slots_of
from tdhook.relevance.propagation.places import Place
from tdhook.relevance.propagation.reference import Reference
from tdhook.tape.internals import components_of
from tdhook.tape.unchanged import Unchanged

__all__ = ["Kept", "There"]


@dataclass
class There:
    """What a run on a reference left behind.

    Attributes:
        outputs: what may be explained, by key.
        sources: what is attributed, by key.
        inputs: the attributed inputs.
        finite: keys of ``outputs`` all of whose values were seen to be finite.
    """

    outputs: Callable[[NestedKey], Tensor]
    sources: Mapping[NestedKey, Tensor]
    inputs: Mapping[NestedKey, Tensor]
    finite: set[NestedKey] = field(default_factory=set)


@dataclass
class Kept:
    """A run on a reference, with what tells whether another one would be the same.

    That is what the model was given, its parameters and buffers and what else its modules hold, the precision that
    computes, and, call by call, the constants and numbers that were met.

    Attributes:
        there: what it left behind.
        given: the entries that the model read, as far as they may change.
    """

    there: There
    given: dict[NestedKey, Tensor]
    places: list[Place]
    reads: list[tuple[str, str, object]]
    _state: list[Unchanged]
    _constants: list[Unchanged]
    _modes: list[object]

    @staticmethod
    def of(
        there: There, given: Mapping[NestedKey, Tensor], reference: Reference, modules: Sequence[nn.Module]
    ) -> Kept:
        """Keep what a run has just left behind."""
        # The places go on being those of the run that is explained; what is kept is no part of its tape.
        places = [place.to_keep() for place in reference.places]
        own = _tensors(modules)
        state, constants = map(Unchanged, own), map(Unchanged, _constants(reference.places, own))
        return Kept(there, dict(given), places, reference.reads, [*state], [*constants], held_by(modules))

    def fits(
        self, given: Mapping[NestedKey, Tensor], reference: Reference, modules: Sequence[nn.Module]
    ) -> bool:
        """Whether the same would come out again; if so, it is filled in."""
        if not _same_entries(self.given, given) or len(self.places) != len(reference.places):
            return False
        if self._modes != held_by(modules) or self.reads != reference.reads:
            return False
        own = _tensors(modules)
        if not _are(own, self._state) or not _are(_constants(reference.places, own), self._constants):
            return False
        pairs = list(zip(reference.places, self.places, strict=True))
        if not all(place.meets(kept) for place, kept in pairs):
            return False
        for place, kept in pairs:
            place.fill_as(kept)
        return True


def _tensors(modules: Sequence[nn.Module]) -> list[Tensor]:
    return [registry[name] for registry, name in slots_of(modules)]


def _constants(places: Sequence[Place], own: Sequence[Tensor]) -> list[Tensor]:
    """The large constants that were met and no module holds; of small ones, places keep the values."""
    known = set(map(_address, own))
    found = {_address(x): x for place in places for x in place.constants if _address(x) not in known}
    return list(found.values())


def _address(x: Tensor) -> int:
    return components_of(x)[-1].data_ptr()


def _are(now: Sequence[Tensor], before: Sequence[Unchanged]) -> bool:
    return len(now) == len(before) and all(map(Unchanged.is_of, before, now))


def _same_entries(kept: Mapping[NestedKey, Tensor], now: Mapping[NestedKey, Tensor]) -> bool:
    if kept.keys() != now.keys():
        return False
    return all(
        x.shape == now[key].shape and x.dtype == now[key].dtype and torch.equal(x, now[key])
        for key, x in kept.items()
    )
