"""Rulebooks: which rule each operation of a model has."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from tdhook.conventions import Convention
from tdhook.models.paths import Paths
from tdhook.relevance.operations.applied import Applied
from tdhook.relevance.operations.asking import Asking
from tdhook.relevance.operations.known import Known, learned
from tdhook.relevance.operations.parties import Entered, Found
from tdhook.relevance.operations.readings import Reading
from tdhook.relevance.propagation.call import Call, Run
from tdhook.relevance.propagation.inherited import LINEAR, MADE_OF_OTHERS
from tdhook.relevance.propagation.rule import Rule
from tdhook.relevance.rules.simple import IgnoreRule

__all__ = ["Rulebook"]

_NATIVE = IgnoreRule()
_AT_ONCE = MADE_OF_OTHERS | {LINEAR}


class Rulebook:
    """Finds the rules of operations: what a composite says, or else that of the operation.

    Args:
        asking: asks the composite.
        reading: what rules see of the values, and so which rule an operation has by itself.
        flow: the convention of the backward pass.
        paths: where in the model an operation is performed.
        defaults: whether what the composite leaves open has the rule of its operation.

    Attributes:
        known: what is known of each torch function that was called.
    """

    def __init__(
        self, asking: Asking, reading: Reading, flow: Convention, paths: Paths, *, defaults: bool
    ) -> None:
        self.asking, self.reading, self.defaults = asking, reading, defaults
        self.flow, self._paths = flow, paths
        self.known: dict[object, Known] = {}
        self._functions: WeakKeyDictionary[type, Known] = WeakKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        # What is known of torch functions is found again; they cannot all be pickled.
        return {**self.__dict__, "known": {}, "_functions": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _functions=WeakKeyDictionary())

    def learn(self, func: Any) -> Known:
        """What is known of a function, which is called for the first time."""
        known = self.known[func] = self._learned(func)
        return known

    def learn_function(self, func: Applied) -> Known:
        """What is known of an autograd function: one application is told by another, as they are no one function."""
        known = self._functions.get(func.function)
        if known is None:
            known = self._functions[func.function] = self._learned(func)
        return known

    def _learned(self, func: Any) -> Known:
        known = learned(func)
        self.asking.once(known, self._paths)
        if not known.in_place and not self.asking.by_path:
            default = (
                known.own or self.reading.default(known.operation.name, (), {}) if self.defaults else _NATIVE
            )
            rule = default if known.rule is None else known.rule
            known.quick = rule is not None and rule.native
        return known

    def find(self, known: Known, args: Any, kwargs: Any, entered: Entered | None) -> Found:
        """The rule of one call, and the selector that chose it.

        Args:
            known: what is known of the function.
            args: its arguments by place.
            kwargs: its arguments by name.
            entered: the layer that is running whose rule is that of an operation inside it.

        Returns:
            ``None`` as the rule where it is made of other operations, or nothing is known of it.
        """
        # One that is made of others may be written in Python, around the one of the same name.
        if (
            entered is not None
            and entered.means(known.operation, args, kwargs)
            and (
                entered.operation in _AT_ONCE
                or self.reading.default(known.operation.name, args, kwargs) is not None
            )
        ):
            entered.found = True
            return None, entered.rule
        self.asking.each(known, self._paths)
        if known.rule is not None:
            return known.selector, known.rule
        if not self.defaults:
            return None, _NATIVE
        return None, known.own or self.reading.default(known.operation.name, args, kwargs)

    def at_once(self, rule: Rule, call: Call) -> Run | None:
        """How a call that a rule writes out is made without that, if each operation inside has one rule only."""
        if self.asking.ordered or not self.defaults:
            return None
        ahead = self.asking.ahead(self._paths)

        def rule_of(operation: str, *args: Any) -> Rule | None:
            return ahead(operation) or self.reading.default(operation, args, {})

        return rule.at_once(call, self.flow, rule_of)
