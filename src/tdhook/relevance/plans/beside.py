"""The run on the reference, beside the one that is explained, under the same rules."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager

from tdhook.relevance.plans.plan import Plan
from tdhook.tape.draws import none_drawn

__all__ = ["Beside"]


class Beside:
    """A model on a reference, while the rules of a plan are on it: :class:`~tdhook.passes.within.Within`.

    Args:
        plan: the plan, of differences.
    """

    whole = False

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    @property
    def overwrites(self) -> bool:
        """Whether the model was seen to overwrite tensors."""
        interception = self.plan.interception
        return interception is not None and interception.guard.active

    @property
    def aside(self) -> bool:
        """Whether what runs right now belongs to a rule."""
        interception = self.plan.interception
        return interception is not None and interception.aside

    def attached(self) -> AbstractContextManager[None]:
        """The rules are on already, and stay."""
        return self.plan.still_attached()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Fill in what the calls of the run that is explained meet here."""
        reference = self.plan.reference
        assert reference is not None, "the plan is one of values"
        with none_drawn(), self.plan.within(tracked=not self.plan.seen), reference.beside():
            yield

    def clear(self) -> None:
        """Nothing was seen: how the model is to be run is known from the run that is explained."""

    def returned(self, values: Iterable[object]) -> None:
        """Nothing is done."""
