"""Readings: what rules see of a model's values, and so which rule each operation has where nobody says otherwise."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from tdhook.conventions import Convention
from tdhook.relevance.operations.placing import leaves_some
from tdhook.relevance.operations.table import ARITHMETIC, OPERATIONS, default_rule
from tdhook.relevance.operations.written_out import statistics_written_out, written_out
from tdhook.relevance.propagation.binding import Bound
from tdhook.relevance.propagation.operation import Operation
from tdhook.relevance.propagation.rule import Rule
from tdhook.relevance.rules.simple import IgnoreRule, PassRule
from tdhook.selectors.kinds import ELEMENTWISE, INDEXED, MOVES, RECURRENT
from tdhook.tape.functions import on_tape

__all__ = ["DIFFERENCES", "VALUES", "Reading"]


class Reading(Protocol):
    """How the values of a model are seen."""

    def default(self, name: str, args: Sequence[object], kwargs: Mapping[str, object]) -> Rule | None:
        """The rule of one call of an operation, or ``None`` where it is made of others or unknown."""

    def written_out(self, name: str) -> Callable[..., Any] | None:
        """The computation of a fused operation in others."""

    def bound(self, rule: Rule, operation: Operation, flow: Convention) -> Bound:
        """How a rule runs an operation."""

    def opens(self, rule: Rule) -> bool:
        """Whether a rule writes its call out as operations that are ruled in turn."""


class _Values:
    """As they are."""

    def default(self, name: str, args: Sequence[object], kwargs: Mapping[str, object]) -> Rule | None:
        return default_rule(name, args, kwargs)

    def written_out(self, name: str) -> Callable[..., Any] | None:
        return written_out(name)

    def bound(self, rule: Rule, operation: Operation, flow: Convention) -> Bound:
        return Bound(rule, flow, rule.bound(operation, flow))

    def opens(self, rule: Rule) -> bool:
        return rule.opens


class _Differences:
    """As differences from what they are on a reference.

    Whatever an operation is, its difference is shared by its secant; nothing is held constant. So all arrives.
    """

    def default(self, name: str, args: Sequence[object], kwargs: Mapping[str, object]) -> Rule | None:
        if name in _PICKS:
            return ARITHMETIC
        if not args and not kwargs:
            # Else it depends on the call, or is nothing to be left alone.
            return _MOVES if name in _STAYS else None
        if name in MOVES:
            return default_rule(name, args, kwargs)  # sums, where that is said
        if name in ELEMENTWISE and _is_of_one(args, kwargs):
            return _PASSES
        if statistics_written_out(name) is not None or leaves_some(name, args, kwargs):
            return None
        if "dropout" in name and isinstance(default_rule(name, args, kwargs), IgnoreRule):
            return _MOVES  # it is off
        if name in RECURRENT or name == "scaled_dot_product_attention":
            return OPERATIONS[name]
        if name in ("batch_norm", "instance_norm") and len(args) < 6:
            return None
        return ARITHMETIC if name in OPERATIONS else default_rule(name, args, kwargs)

    def written_out(self, name: str) -> Callable[..., Any] | None:
        return statistics_written_out(name) or written_out(name)

    def bound(self, rule: Rule, operation: Operation, flow: Convention) -> Bound:
        return Bound(rule, flow, rule.against(operation, flow))

    def opens(self, rule: Rule) -> bool:
        return rule.opens_against


VALUES: Reading = _Values()
DIFFERENCES: Reading = _Differences()

_MOVES, _PASSES = IgnoreRule(), PassRule()
_PICKS = frozenset(("where", "masked_fill"))
# Where the others move data to may be told by values, and be another place on the reference.
_STAYS = MOVES - INDEXED


def _is_of_one(args: Sequence[object], kwargs: Mapping[str, object]) -> bool:
    """Whether an element-wise function has but one tensor, of the shape of its result."""
    tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
    return len(tensors) == 1 and on_tape(tensors[0]) and not tensors[0].is_complex()
