"""Merges: which batch norm follows which call of a layer, told in the forward pass and asked in the backward pass."""

from __future__ import annotations

from weakref import WeakKeyDictionary, WeakSet

from torch import nn

__all__ = ["Merges", "Place"]


class Place:
    """One place on the tape, told from all others by being itself."""

    __slots__ = ("__weakref__",)


class Merges:
    """What the batch norms of one plan tell the layers before them.

    The batch norm knows the call of the layer, whose output it is given; the layer learns of the batch norm only after
    it has run. Nothing on the tape is changed: whoever put a place there asks here what was told of it.
    """

    def __init__(self) -> None:
        self._norms: WeakKeyDictionary[Place, nn.Module] = WeakKeyDictionary()
        self._postponed: WeakSet[Place] = WeakSet()

    def __reduce__(self) -> tuple[object, ...]:
        return Merges, ()

    def merge(self, norm: nn.Module, layer: Place) -> None:
        """Merge a batch norm into the call of a layer."""
        self._norms[layer] = norm

    def norm_of(self, layer: Place) -> nn.Module | None:
        """The batch norm that is merged into the call of a layer, if any."""
        return self._norms.get(layer)

    def postpone(self, place: Place) -> None:
        """Stabilise behind the batch norm what is stabilised here else."""
        self._postponed.add(place)

    def is_postponed(self, place: Place) -> bool:
        """Whether relevance is stabilised elsewhere."""
        return place in self._postponed
