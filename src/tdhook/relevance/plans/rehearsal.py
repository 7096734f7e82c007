"""Rehearsing: the operations of one run, taken down for a plan; and the plan that is made once a model has run."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, cast

import torch
from tensordict import TensorDictBase
from torch import Tensor

from tdhook.markup import shown
from tdhook.models.sites import Performance
from tdhook.models.state import restored
from tdhook.passes.runner import Runner
from tdhook.relevance.ledger.ledger import Ledger
from tdhook.relevance.operations.parties import Unmatched
from tdhook.relevance.plans.plan import Plan, Row
from tdhook.relevance.propagation.binding import Bound
from tdhook.relevance.propagation.call import Call
from tdhook.relevance.propagation.rule import Rule
from tdhook.selectors import Selector

__all__ = ["Ready", "learn_order", "rehearse"]


class Ready:
    """The plan of one model: made from the order of its execution, where the composite depends on it.

    Args:
        make: makes the plan, given what the model is run on; ``None`` where the order of registration will do.
        check: told of a plan once it is settled.
        needs_execution: whether the plan depends on the order in which modules run.

    Attributes:
        plan: the plan, as far as it is known.
        ledger: accounts of the last call, if they were asked for.
        kept: a run on a reference that may serve once more, if one does.
        one_row: whether one row of a reference stands for all of a batch; ``None`` until that was seen.
    """

    def __init__(
        self,
        make: Callable[[TensorDictBase | None], Plan],
        check: Callable[[Plan], None],
        needs_execution: bool,
    ) -> None:
        self._make, self._check = make, check
        self._pending = needs_execution
        self.plan = make(None)
        self.ledger: Ledger | None = None
        self.kept: object = None
        self.one_row: bool | None = None
        self._chance: Tensor | None = None
        if not needs_execution:
            check(self.plan)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "kept": None}

    def draw(self) -> None:
        """Take down what random numbers come next."""
        self._chance = None if torch.compiler.is_compiling() else torch.get_rng_state()

    def drawn(self) -> bool:
        """Whether any were drawn since."""
        return self._chance is None or not torch.equal(self._chance, torch.get_rng_state())

    def _repr_html_(self) -> str:
        return shown(self.plan, self.ledger)

    def ready(self, runner: Runner) -> Plan:
        """The plan to run what an explained module was called with."""
        if self._pending:
            runner.check()
            plan = self._made(runner)
            learn_order(plan, Runner(runner.setup, runner.given))
            self._check(plan)
            self.plan, self._pending = plan, False
        return self.plan

    def _made(self, runner: Runner) -> Plan:
        try:
            return self._make(runner.given)
        except Exception:
            with runner.forward(runner.td):  # which says it better, if it can
                pass
            raise


def learn_order(plan: Plan, runner: Runner) -> None:
    """Where the plan depends on it, run a model once to see when it performs which operation; leave it as it was."""
    if plan.ordering is None:
        return

    def attempt() -> tuple[Performance, ...]:
        with runner.forward(runner.td, plan.rules_on(observer=_Watch(plan))):
            assert plan.interception is not None
            return tuple(plan.interception.asking.performed)

    with restored(runner.setup.model.root):
        plan.ordering.performed = runner.carefully(attempt)


def rehearse(plan: Plan, runner: Runner) -> None:
    """Run a model once under a plan, take down its operations as ``plan.operations``, and leave all as it was."""
    watch = _Watch(plan)

    def attempt() -> None:
        watch.rows.clear()
        with runner.forward(runner.td, plan.rules_on(observer=watch)):
            pass

    with restored(runner.setup.model.root):
        runner.carefully(attempt)
    called = {id(row.module) for row in watch.rows}
    ruled = [row for row in plan.rows if row.rule and not row.rule.native]
    # Of a layer that is entered, operations were seen.
    entered = {row.path: row for row in ruled if row.rule and row.rule.enters(row.module, row.inherited)}
    seen = [_as_entered(row, entered.get(row.path)) for row in watch.rows]
    paths = {row.path for row in seen}
    idle = (
        replace(row, runs=False)
        for row in ruled
        if id(row.module) not in called and not (row.path in entered and row.path in paths)
    )
    plan.operations = (*seen, *idle)


def _as_entered(row: Row, layer: Row | None) -> Row:
    """An operation inside a layer whose rule it has, for the reason for which the layer has it."""
    if layer is None or row.operation is None or row.rule is not layer.rule or row.selector is not None:
        return row
    return replace(row, selector=layer.selector)


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

    def clear(self) -> None:
        """Forget the calls."""
        self.rows.clear()

    def inside(self, call: Call) -> Call:
        """Calls inside units are not taken down."""
        return call

    def again(self) -> AbstractContextManager[None]:
        """A rehearsal has no backward pass, in which anything would be run once more."""
        return nullcontext()
