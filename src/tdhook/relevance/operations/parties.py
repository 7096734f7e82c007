"""Whom an interception of operations has to do with: what it asks, what takes note of it, and what it says."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from torch import nn

from tdhook.relevance.propagation.binding import Bound
from tdhook.relevance.propagation.call import Call
from tdhook.relevance.propagation.entering import is_linear
from tdhook.relevance.propagation.inherited import LINEAR
from tdhook.relevance.propagation.operation import Operation
from tdhook.relevance.propagation.rule import Rule
from tdhook.selectors import Selector

__all__ = [
    "COMPILED",
    "DIFFERENTIATES",
    "GIVES_OUT_LATER",
    "HIDDEN",
    "OVERWRITES",
    "TRANSFORMS",
    "Entered",
    "Found",
    "Lookup",
    "Observer",
    "Unmatched",
]

OVERWRITES = (
    "`{}` overwrites an argument, and its derivative is its own, so that no rule can follow; give the module `{}`, "
    "which calls it, a rule, EpsilonRule say, so that it runs as one unit"
)
COMPILED = (
    "the module `{}` ({}) was compiled by torch.jit, and no rule sees what is computed inside; explain the module that "
    "it was compiled from (torch.jit.script, torch.jit.trace), or give it a rule, so that it runs as one unit: "
    "(Type(torch.jit.ScriptModule), EpsilonRule())"
)
HIDDEN = (
    "`{}` overwrites off the tape what depends on the inputs, in module `{}`, and that is read afterwards: "
    "torch.no_grad(), detach() and .data hide it from derivatives, so that no rule can follow; write to a new tensor"
)
DIFFERENTIATES = (
    "the model differentiates in its forward pass, in module `{}`, where rules stand in for derivatives; give that "
    "module a rule, EpsilonRule say, so that it runs as one unit"
)
GIVES_OUT_LATER = (
    "module `{}`, a {}, has a rule, and returns a {}, which gives out tensors that no rule sees; return them in "
    "a tuple, a list, a dictionary or a dataclass, or give the modules inside it rules instead"
)
TRANSFORMS = (
    "the model differentiates in its forward pass by torch.func, around module `{}`, where rules stand in for "
    "derivatives; give the module that calls torch.func a rule, EpsilonRule say, so that it runs as one unit"
)


class Unmatched:
    """Stands for the selector of an operation that nothing is known of."""


Found: TypeAlias = "tuple[Any, Rule | None]"
Lookup: TypeAlias = "Callable[[str, str, nn.Module, int], Found]"
"""``(operation, path of the module around it, that module, how many of that name it performed before) -> (selector,
rule)``."""


@dataclass
class Entered:
    """A layer is running whose rule is that of an operation inside it.

    Attributes:
        rule: the rule.
        operation: the name of the operation, :data:`~tdhook.relevance.propagation.inherited.LINEAR` for any that is
            linear with weights.
        found: whether it was seen.
    """

    rule: Rule
    operation: str
    found: bool = False

    def means(self, operation: Operation, args: object, kwargs: object) -> bool:
        """Whether a call is one of that operation."""
        if self.operation == LINEAR:
            return is_linear(operation, args, kwargs)
        return operation.name == self.operation


class Observer(Protocol):
    """Makes the calls of a forward pass itself, to take note of them."""

    def call(self, path: str, selector: Selector | Unmatched | None, bound: Bound, call: Call) -> Any:
        """Make one call of a module that has a rule, or of an operation."""

    def clear(self) -> None:
        """Forget the calls: the forward pass is made once more."""

    def inside(self, call: Call) -> Call:
        """A call inside such a module, as it is to be made."""

    def again(self) -> AbstractContextManager[None]:
        """What is entered around calls that were made before and are made once more."""
