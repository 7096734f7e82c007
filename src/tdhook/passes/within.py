"""How a method wants a model to be run, and what it compares with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from tensordict.utils import NestedKey
from torch import Tensor

from tdhook.targets.base import Seeds

__all__ = ["Against", "AsItIs", "Learnt", "Within"]


class Learnt(BaseException):
    """A run has shown that the model is to be run another way: it is run again.

    Not an ``Exception``, so that the model's own handlers let it pass.
    """


class Within(Protocol):
    """How a method wants a model to be run."""

    @property
    def overwrites(self) -> bool:
        """Whether the model may overwrite what it is given, which then are no leaves of the graph."""

    @property
    def whole(self) -> bool:
        """Whether all of the model is wanted on the tape, and not only what the target depends on."""

    @property
    def aside(self) -> bool:
        """Whether what runs right now belongs to the method, and is no operation of the model."""

    def attached(self) -> AbstractContextManager[object]:
        """Entered around the forward pass and the backward passes."""

    def running(self) -> AbstractContextManager[object]:
        """Entered around the forward pass alone."""

    def clear(self) -> None:
        """Forget what was seen of the forward pass: the model runs once more."""

    def returned(self, values: Iterable[object]) -> None:
        """Be told what the model returned.

        Raises:
            Learnt: it is to be run another way.
        """


class Against(Protocol):
    """A reference that what is explained is compared with."""

    def rises(self, seeds: Seeds) -> Seeds:
        """Where the backward pass starts, given where it would for the values."""

    def rise(self, key: NestedKey, value: Tensor) -> Tensor:
        """How far a value is from what it is on the reference."""

    def beside(self, value: Tensor) -> tuple[Sequence[Tensor], int]:
        """Where the function behind a value hands over to the layer that made it, if it does.

        And which axis there is the first one of the value.
        """


class AsItIs:
    """The model as it is; it may overwrite what it is given."""

    overwrites = True
    whole = False
    aside = False

    def attached(self) -> AbstractContextManager[object]:
        """Nothing is changed."""
        return nullcontext()

    def running(self) -> AbstractContextManager[object]:
        """Nothing is changed."""
        return nullcontext()

    def clear(self) -> None:
        """Nothing was seen."""

    def returned(self, values: Iterable[object]) -> None:
        """Nothing is done."""
