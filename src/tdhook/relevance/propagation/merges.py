"""Merges: which batch norm follows which call of a layer, told in the forward pass and asked in the backward pass."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from torch import nn
from torch.autograd.graph import Node

__all__ = ["Merges", "Place"]


class Place:
    """One place on the tape, told from all others by being itself."""

    __slots__ = ("__weakref__",)


class Merges:
    """What the batch norms of one plan tell the layers before them.

    The batch norm knows the call of the layer, whose output it is given; the layer learns of the batch norm only after
    it has run. Nothing on the tape is changed: whoever put a place there asks here what was told of it.

    What the layer returns may be read elsewhere, too: around the batch norm, or by another one. Then there is no one
    layer that both amount to, and nothing is merged.

    Attributes:
        used: whether the model is known to have any.
    """

    def __init__(self, *, used: bool = True) -> None:
        self.used = used
        self._norms: WeakKeyDictionary[Place, nn.Module] = WeakKeyDictionary()
        self._postponed: WeakSet[Place] = WeakSet()
        self._apart: WeakSet[nn.Module] = WeakSet()
        self._told: list[tuple[nn.Module, Sequence[Any]]] = []

    def __reduce__(self) -> tuple[object, ...]:
        return partial(Merges, used=self.used), ()

    def merge(self, norm: nn.Module, layer: Place) -> None:
        """Merge a batch norm into the call of a layer."""
        self._norms[layer] = norm

    def look_at(self, norm: nn.Module, way: Sequence[Any]) -> None:
        """See to it that :meth:`settle` looks whether something else reads what a batch norm is given.

        Args:
            norm: the batch norm.
            way: the nodes of the tape from what it is given back to the layer that it is merged into.
        """
        self._told.append((norm, way))

    def settle(self, ends: Iterable[Node | None]) -> bool:
        """Look whether what was told holds: whether nothing else reads what was to be merged.

        Args:
            ends: the nodes of what the model returned.

        Returns:
            Whether it holds. If not, some batch norms are :meth:`is_apart` from now on.
        """
        told, self._told = self._told, []
        if not told:
            return True
        norms: defaultdict[Any, set[nn.Module]] = defaultdict(set)
        known: Counter[Any] = Counter()
        for norm, way in told:
            norms[way[-1]].add(norm)
            known[way[0]] += 1
        known.update(before for _, before in {step for _, way in told for step in pairwise(way)})
        read = _readers(ends, known)
        apart = [
            norm
            for norm, way in told
            if len(norms[way[-1]]) > 1 or any(read[node] > known[node] for node in way)
        ]
        self._apart.update(apart)
        return not apart

    def forget(self) -> None:
        """Forget what was told in a forward pass that is over, or was broken off."""
        self._told.clear()

    def is_apart(self, norm: nn.Module) -> bool:
        """Whether something else reads what a batch norm is given."""
        return norm in self._apart

    def norm_of(self, layer: Place) -> nn.Module | None:
        """The batch norm that is merged into the call of a layer, if any."""
        return self._norms.get(layer)

    def postpone(self, place: Place) -> None:
        """Stabilise behind the batch norm what is stabilised here else."""
        self._postponed.add(place)

    def is_postponed(self, place: Place) -> bool:
        """Whether relevance is stabilised elsewhere."""
        return place in self._postponed


def _readers(ends: Iterable[Node | None], of: Collection[Any]) -> Counter[Any]:
    """How often some nodes are read on the tape: looked at in each call, and so in one loop."""
    found: Counter[Any] = Counter()
    ahead = [node for node in ends if node is not None]
    seen = set(ahead)
    while ahead:
        for node, _ in ahead.pop().next_functions:
            if node in of:
                found[node] += 1
            if node is not None and node not in seen:
                seen.add(node)
                ahead.append(node)
    return found
