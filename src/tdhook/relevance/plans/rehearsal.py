"""Rehearsing: the operations of one run, taken down for a plan."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, cast

from tdhook.relevance.operations.interception import Unmatched
from tdhook.relevance.plans.plan import Plan, Row
from tdhook.relevance.propagation.binding import Bound
from tdhook.relevance.propagation.call import Call
from tdhook.relevance.propagation.rule import Rule
from tdhook.selectors import Selector

__all__ = ["watched"]


class _Watch:
    """Takes down the calls of a forward pass."""

    def __init__(self, plan: Plan) -> None:
        self.rows: list[Row] = []
        self._known = {id(row.module): row for row in plan.rows}

    def call(self, path: str, selector: Selector | Unmatched | None, bound: Bound, call: Call) -> Any:
        """Make one call and take it down."""
        module = call.module
        self.rows.append(self._known.get(id(module), Row(path, module, cast(Rule, bound.rule), selector)))
        return bound.run(call)

    def inside(self, call: Call) -> Call:
        """Calls inside units are not taken down."""
        return call

    def again(self) -> AbstractContextManager[None]:
        """A rehearsal has no backward pass, in which anything would be run once more."""
        return nullcontext()


@contextmanager
def watched(plan: Plan) -> Iterator[None]:
    """Take down the operations of the forward pass within as ``plan.operations``."""
    if plan.interception is None:
        yield
        return
    watch = _Watch(plan)
    plan.interception.observer = watch
    try:
        yield
    finally:
        plan.interception.observer = None
    called = {id(row.module) for row in watch.rows}
    ruled = (row for row in plan.rows if row.rule and not row.rule.native)
    idle = (replace(row, runs=False) for row in ruled if id(row.module) not in called)
    plan.operations = (*watch.rows, *idle)
