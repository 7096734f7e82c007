"""Calls: one call of a module or an operation, as it is about to be made under a rule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor, nn

from tdhook.relevance.propagation.merges import Merges
from tdhook.relevance.propagation.reference import Reference
from tdhook.relevance.propagation.reporting import Report
from tdhook.relevance.propagation.weights import WeightCache
from tdhook.tape.functions import live, on_tape
from tdhook.tape.internals import children_of
from tdhook.tape.overwriting import out_of_place
from tdhook.tape.trees import tree_leaves

__all__ = ["ALONE", "Call", "Run", "Setting"]


@dataclass(frozen=True, slots=True)
class Setting:
    """What surrounds a call.

    Attributes:
        report: where to report what the rule keeps, if anyone wants to know.
        weights: keeps modified weights, if anything does.
        offered: what batch norms tell the layers before them, if they may be merged.
        reference: what the calls meet on a reference, if differences from one are explained.
    """

    report: Report | None = None
    weights: WeightCache | None = None
    offered: Merges | None = None
    reference: Reference | None = None

    @property
    def merges(self) -> Merges | None:
        """What batch norms tell the layers before them, if there are any."""
        return self.offered if self.offered is not None and self.offered.used else None


ALONE = Setting()
"""The setting of a rule that is registered on a module, without a plan around it."""


class Call(NamedTuple):
    """One call that is about to be made: a value, of which rules make others.

    Attributes:
        module: the module, or the :class:`~tdhook.relevance.propagation.operation.Operation`.
        function: its forward without the rule, or the torch function.
        args: what it is called with, and ``kwargs``: likewise, by name.
        setting: what surrounds it.
    """

    module: nn.Module
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    setting: Setting = ALONE

    def execute(self) -> Any:
        """Make the call as it is."""
        return self.function(*self.args, **self.kwargs)

    def natively(self) -> Any:
        """Make the call as it is, but let nothing inside it overwrite its input."""
        module = self.module
        if children_of(module) or module.__dict__.get("inplace"):
            with out_of_place(module.modules()):
                return self.function(*self.args, **self.kwargs)
        return self.function(*self.args, **self.kwargs)

    def on(self, x: object) -> Call:
        """The same call with another first argument."""
        module, function, args, kwargs, setting = self
        return Call(module, function, (x, *args[1:]), kwargs, setting)

    def given(self, args: tuple[object, ...], kwargs: dict[str, object]) -> Call:
        """The same call with other arguments."""
        return Call(self.module, self.function, args, kwargs, self.setting)

    def within(self, setting: Setting) -> Call:
        """The same call in another setting."""
        return Call(self.module, self.function, self.args, self.kwargs, setting)

    def live(self, function: Callable[[Tensor], Tensor]) -> Call:
        """The same call with ``function`` applied to all its tensors on the tape."""
        args: tuple[Any, ...] = live(function, self.args)
        kwargs: dict[str, Any] = live(function, self.kwargs) if self.kwargs else self.kwargs
        return Call(self.module, self.function, args, kwargs, self.setting)

    def tensors(self) -> list[Tensor]:
        """The tensors on the tape among its arguments, nested ones included."""
        leaves = tree_leaves((self.args, self.kwargs))
        return [x for x in leaves if isinstance(x, Tensor) and on_tape(x)]


Run: TypeAlias = Callable[[Call], Any]
"""Makes calls of one module under one rule."""
