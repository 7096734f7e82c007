"""Methods around others: what they ask, read and have seen is what the other does."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook.contexts.attribution import Attribution
from tdhook.models.model import Model
from tdhook.passes.runner import Runner
from tdhook.perturbing.references import Fill
from tdhook.targets import TargetLike
from tdhook.targets.through import tells_units

__all__ = ["AroundMethod", "explained_first", "require_values_alone"]

Self = TypeVar("Self", bound="AroundMethod")


class AroundMethod(Attribution):
    """A method that explains by another.

    Args:
        method: the other, which says what is explained and attributed.
    """

    def __init__(self, method: Attribution) -> None:
        super().__init__(**method.shared)
        self.method = method

    def around(self: Self, method: Attribution) -> Self:
        """The same around another method."""
        other = copy.copy(self)
        other.target, other.seeder, other.method = method.target, method.seeder, method
        return other

    def asked(self: Self, **shared: Any) -> Self:
        """The same, with other options of those that all methods take."""
        other = self.around(self.method.asked(**shared))
        Attribution.__init__(other, **other.method.shared)
        return other

    def explaining(self: Self, target: TargetLike) -> Self:
        """The same for another target."""
        return self.around(self.method.explaining(target))

    def among(self: Self, td: TensorDictBase) -> Self:
        """Around the method that compares with those of ``td``, if it does."""
        return self.around(self.method.among(td))

    def drawn_from(self: Self, rows: Callable[[], TensorDictBase]) -> Self:
        """Around the method that compares with these rows, if it does."""
        return self.around(self.method.drawn_from(rows))

    def settled(
        self: Self,
        keys: Sequence[NestedKey],
        td: TensorDictBase,
        valid: Tensor | None = None,
        *,
        each: bool = False,
        first: int = 0,
    ) -> tuple[Self, TensorDictBase, Fill]:
        """Around the method for parts of a batch."""
        method, td, fill = self.method.settled(keys, td, valid, each=each, first=first)
        return self.around(method), td, fill

    def start(self, model: Model) -> Any:
        """What the method works out."""
        return self.method.start(model)

    def reads(self, td: TensorDictBase) -> list[NestedKey]:
        """What the method reads."""
        return self.method.reads(td)

    def reads_signs(self, state: Any) -> bool:
        """Whether the method does."""
        return self.method.reads_signs(state)

    def looks_across(self, state: Any) -> bool:
        """Whether the method does."""
        return self.method.looks_across(state)

    def learnt(self, state: Any) -> str:
        """What the method has seen."""
        return self.method.learnt(state)

    @property
    def changes_inputs(self) -> bool:
        """Whether the method does."""
        return self.method.changes_inputs

    @property
    def compares(self) -> bool:
        """Whether the method does."""
        return self.method.compares

    @property
    def steps_before(self) -> int:
        """As many as the method looks at."""
        return self.method.steps_before


def explained_first(
    method: Attribution, runner: Runner, td: TensorDictBase, state: Any = None
) -> tuple[Mapping[NestedKey, Tensor], Runner]:
    """What a method says of the batch as it is, and what runs others after it.

    They explain the same units, where its relevance says which matter most.
    """
    there = runner.on(td, state=state)
    found = method.explain(there, td)
    runner.base = there.base
    return found, there.on_told_units(td) if tells_units(runner.setup.question.target) else there


def require_values_alone(method: Attribution, of: str, which: str) -> None:
    """A method explains values, and writes relevance alone.

    Args:
        method: the method.
        of: what is of such methods, for the message: ``"a product is of"``.
        which: and has nothing else: ``"a product has"``.

    Raises:
        TypeError: it compares with a reference.
        ValueError: it writes more than relevance.
    """
    if method.compares:
        raise TypeError(f"{method!r} compares with a reference: {of} methods that explain the value")
    if method.writes or method.writes_under:
        raise ValueError(f"{method!r} writes more than relevance, which {which} not: leave out ledger")
