"""Asking: what a composite says of operations, and in which order it is asked of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from tdhook.models.paths import Paths
from tdhook.models.sites import Performance
from tdhook.relevance.operations.known import Known
from tdhook.relevance.operations.parties import Lookup
from tdhook.relevance.propagation.rule import Rule

__all__ = ["Asking"]


class Asking:
    """Asks a composite for the rules of operations.

    Args:
        lookup: asks; ``None`` if the composite says nothing of operations.
        by_path: whether its answer depends on the module around the operation.
        ordered: whether it depends on when the operation is performed.

    Attributes:
        performed: where it is ordered, the operations of the last forward pass, as the composite was asked for them.
    """

    def __init__(self, lookup: Lookup | None, *, by_path: bool, ordered: bool) -> None:
        self._lookup, self.by_path, self.ordered = lookup, by_path, ordered
        self.performed: list[Performance] = []
        self._counts: Counter[tuple[str, str]] = Counter()

    def begin(self) -> None:
        """Begin a forward pass."""
        if self.ordered:
            self.performed.clear()
            self._counts.clear()

    def once(self, known: Known, paths: Paths) -> None:
        """Ask where the answer is the same for all calls of a function."""
        if self._lookup is not None and not self.by_path:
            known.selector, known.rule = self._lookup(known.operation.name, *paths.innermost, 0)

    def each(self, known: Known, paths: Paths) -> None:
        """Ask where each call has an answer of its own."""
        if self._lookup is None or not self.by_path:
            return
        operation, (path, module) = known.operation.name, paths.innermost
        number = self._counts[operation, path]
        if self.ordered:
            self._counts[operation, path] += 1
            self.performed.append((operation, path, number))
        known.selector, known.rule = self._lookup(operation, path, module, number)

    def ahead(self, paths: Paths) -> Callable[[str], Rule | None]:
        """What it answers here of each call of an operation, before any is made."""
        lookup = self._lookup
        if lookup is None:
            return lambda operation: None
        path, module = paths.innermost
        return lambda operation: lookup(operation, path, module, 0)[1]

    def refuse_again(self) -> None:
        """Raise where operations that are performed once more would be counted once more.

        Raises:
            NotImplementedError: it is ordered.
        """
        if self.ordered:
            raise NotImplementedError(
                "the composite chooses an operation by when it is performed, First(Op(...)), and the model performs "
                "some once more on the way back (checkpointing): choose it by the module around it, Op(...) & Name(...)"
            )
