"""How the sequences of a batch lie in memory: padded, or packed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

__all__ = ["Packed", "Padded", "Sequences"]

Indices: TypeAlias = "np.ndarray[Any, Any]"


class Sequences(Protocol):
    """Between what a network is given and ``[time, batch, features]``, where what is behind the end may be anything."""

    def steps(self, data: Tensor) -> list[Tensor]:
        """The steps one by one, each ``[running, features]``."""

    def joined(self, steps: Sequence[Tensor]) -> Tensor:
        """The steps as they are given."""

    def spread(self, data: Tensor) -> Tensor:
        """The steps together, ``[time, batch, features]``."""

    def gathered(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`spread`."""

    def backwards(self, x: Tensor) -> Tensor:
        """Each sequence from its end; its own inverse."""

    def last(self, x: Tensor) -> Tensor:
        """The last step of each sequence, ``[batch, features]``."""


@dataclass(frozen=True, slots=True)
class Padded:
    """All sequences have all steps.

    Attributes:
        batch_first: whether they are ``[batch, time, features]``.
    """

    batch_first: bool

    def steps(self, data: Tensor) -> list[Tensor]:
        return list(data.unbind(int(self.batch_first)))

    def joined(self, steps: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(steps), int(self.batch_first))

    def spread(self, data: Tensor) -> Tensor:
        return data.transpose(0, 1) if self.batch_first else data

    def gathered(self, x: Tensor) -> Tensor:
        return self.spread(x)

    def backwards(self, x: Tensor) -> Tensor:
        return x.flip(0)

    def last(self, x: Tensor) -> Tensor:
        return x[-1]


@dataclass(frozen=True, slots=True)
class Packed:
    """Sequences by length, the longest first; step by step those that have it, ``[steps, features]``.

    Attributes:
        sizes: how many have each of the steps.
    """

    sizes: Sequence[int]

    def steps(self, data: Tensor) -> list[Tensor]:
        return list(data.split(list(self.sizes)))

    def joined(self, steps: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(steps))

    def spread(self, data: Tensor) -> Tensor:
        places = self._indices(self._running.flatten().nonzero()[0], data)
        nothing = data.new_zeros(self._running.size, *data.shape[1:])
        return self._by_step(nothing.index_copy(0, places, data))

    def gathered(self, x: Tensor) -> Tensor:
        return self._picked(x, self._running.flatten().nonzero()[0])

    def backwards(self, x: Tensor) -> Tensor:
        steps = np.arange(len(self.sizes))[:, None]
        return self._by_step(self._picked(x, self._place(np.where(self._running, self._ends - steps, steps))))

    def last(self, x: Tensor) -> Tensor:
        return self._picked(x, self._place(self._ends))

    @property
    def _running(self) -> Indices:
        """Which of the sequences have which of the steps, ``[time, batch]``."""
        found: Indices = np.arange(self.sizes[0]) < np.asarray(self.sizes)[:, None]
        return found

    @property
    def _ends(self) -> Indices:
        """The last step of each sequence."""
        found: Indices = self._running.sum(0) - 1
        return found

    def _place(self, steps: Indices) -> Indices:
        """Of one step of each sequence, or several, its place among all."""
        found: Indices = (steps * self.sizes[0] + np.arange(self.sizes[0])).flatten()
        return found

    @staticmethod
    def _indices(places: Indices, x: Tensor) -> Tensor:
        return torch.as_tensor(places, device=x.device)

    def _picked(self, x: Tensor, places: Indices) -> Tensor:
        return x.flatten(0, 1).index_select(0, self._indices(places, x))

    def _by_step(self, x: Tensor) -> Tensor:
        return x.reshape(len(self.sizes), self.sizes[0], *x.shape[1:])
