"""Plans: which module of a model runs under which rule, worked out once and attached for each call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from threading import get_ident
from types import TracebackType
from typing import TypeAlias

from torch import Tensor, nn

from tdhook.conventions import Convention
from tdhook.markup import html_table
from tdhook.models.families import BatchNorm
from tdhook.models.parallel import home_of, lends_weights
from tdhook.models.tracing import Execution
from tdhook.passes.within import Learnt
from tdhook.relevance.ledger.ledger import Ledger
from tdhook.relevance.operations.interception import Interception
from tdhook.relevance.operations.parties import Observer, Unmatched
from tdhook.relevance.propagation.binding import Binding
from tdhook.relevance.propagation.call import ALONE, Setting
from tdhook.relevance.propagation.conversions import finite_product
from tdhook.relevance.propagation.operation import Operation
from tdhook.relevance.propagation.reference import Reference
from tdhook.relevance.propagation.rule import Rule
from tdhook.relevance.rules.batchnorm import merging
from tdhook.relevance.rules.simple import PassRule
from tdhook.selectors import Selector
from tdhook.selectors.kinds import MOVES, WINNER
from tdhook.tape.functions import copying
from tdhook.tape.overwriting import Mutated, out_of_place, overwrites, was_overwritten
from tdhook.tape.undoing import Change, undone

__all__ = ["COLUMNS", "Merge", "Plan", "Row"]

Merge: TypeAlias = "tuple[str | Sequence[str], str]"


@dataclass(frozen=True)
class Row:
    """What a plan says of one module, or of one operation.

    Attributes:
        path: dotted path of the module, or of the one around the operation.
        module: the module, or a stand-in for the operation.
        rule: its rule, if any.
        selector: the selector that matched; ``None`` for a default and for a rule from a mapper.
        open: whether it is a layer that nothing says anything about.
        runs: whether the model called it, as far as that is known.
        inside: whether it is the batch norm inside the layer of that path, which derives from one.
        inherited: whether the selector names a class that the module derives from.
    """

    path: str
    module: nn.Module
    rule: Rule | None
    selector: Selector | Unmatched | None = None
    open: bool = False
    runs: bool = True
    inside: bool = False
    inherited: bool = False

    @property
    def operation(self) -> str | None:
        """The name of the operation; ``None`` for a module."""
        return self.module.name if isinstance(self.module, Operation) else None


class RulesOn:
    """A model under the rules of a plan: :class:`~tdhook.passes.within.Within`.

    Args:
        plan: the plan.
        observer: what takes note of the calls, if anything does.
        whole: whether all of the model is wanted on the tape.
    """

    def __init__(self, plan: Plan, observer: Observer | None, whole: bool) -> None:
        self.plan, self.observer, self.whole = plan, observer, whole
        self._around: ExitStack | None = None
        self._overwrote = False

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

    def attached(self) -> RulesOn:
        """Attach the rules."""
        return self

    def __enter__(self) -> None:
        plan, interception = self.plan, self.plan.interception
        self._detaching = Change(plan.detach)
        if interception is not None:
            self._overwrote = interception.guard.active
            Change(interception.resting())
            interception.observer = self.observer
        try:
            self._around = plan.attach()
        except BaseException:
            self._detaching.undo()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        interception = self.plan.interception
        if interception is not None:
            interception.observer = None
        try:
            if self._around is not None:
                self._around.close()
        finally:
            self._detaching.undo()
        if error is None:
            self.plan.seen = True
        elif isinstance(error, RuntimeError) and was_overwritten(error):
            if interception is None or self._overwrote:
                return
            interception.guard.active = True
            raise Mutated from error

    def running(self) -> AbstractContextManager[None]:
        """Run operations under their rules. The first run tells the path of operations that nothing is known of."""
        plan = self.plan
        interception = plan.interception
        return nullcontext() if interception is None else interception.running(tracked=not plan.seen)

    def clear(self) -> None:
        """Forget the calls of a forward pass that is made once more."""
        if self.observer is not None:
            self.observer.clear()
        if self.plan.reference is not None:
            self.plan.reference.begin()

    def returned(self, values: Iterable[object]) -> None:
        """See whether the model returns what should have been overwritten, and whether what was merged can be.

        Raises:
            Learnt: some of it cannot.
        """
        interception, merges = self.plan.interception, self.plan.setting.merges
        found = list(values) if merges is not None else values
        if interception is not None and interception.outdated.any:
            interception.outdated.check(found)
        if merges is not None and not merges.settle(z.grad_fn for z in found if isinstance(z, Tensor)):
            raise Learnt


COLUMNS = ("module", "type", "rule", "convention", "because")


class Plan:
    """The rows for one model, in execution order where it is known, and the flow that follows from them.

    Args:
        rows: one per module that has a rule, or could have one.
        modules: all modules of the model.
        flow: the convention of the backward pass.
        merges: batch norms to merge by name: path of the batch norm to the linear layers.
        merge: whether batch norms right behind a linear layer are merged.
        sensitivity: whether the result is a modified gradient.
        interception: what runs operations under their rules; ``None`` where only modules have rules.
        setting: what the calls share.
        ordering: the execution that operations are chosen by, where it matters when they are performed.

    Attributes:
        seen: whether the model was run under it.
        operations: the operations that one run was seen to perform, in execution order with the modules that have a
            rule; empty where none was.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        modules: Iterable[nn.Module],
        flow: Convention,
        merges: dict[str, list[nn.Module]],
        merge: bool,
        sensitivity: bool,
        interception: Interception | None,
        setting: Setting = ALONE,
        ordering: Execution | None = None,
    ) -> None:
        self.rows, self.ordering = tuple(rows), ordering
        self.operations: tuple[Row, ...] = ()
        self.flow: Convention = flow
        self.interception = interception
        self._modules = tuple(modules)
        self._lent = any(map(lends_weights, self._modules))
        self.sensitivity = sensitivity
        self.setting = setting
        weights = setting.weights
        self._weights = None if weights is None or weights.keeps_none else weights
        # Layers without a rule may overwrite what they are given: their operations are seen.
        self._units = [row.module for row in rows if interception is None or row.rule is not None]
        self.seen = False
        self._bindings: list[Binding] = []
        self._inside: list[Binding] = []
        self._custom: list[tuple[Rule, nn.Module]] = []
        for row in rows:
            rule = row.rule
            # To ignore a layer of torch's own is to leave it to the rule of its operation; one that derives from it and
            # computes in its own way, to those of its operations.
            own = _is_left_to_operations(row.module) or self.reference is not None
            if rule is None or (rule.native and (own or interception is None)):
                continue
            if rule.binds_itself and not rule.native:
                self._custom.append((rule, row.module))
                continue
            if type(rule) is PassRule and isinstance(row.module, BatchNorm):
                if row.path in merges:
                    rule = merging(merges[row.path])
                elif merge:
                    rule = merging()
            binding = Binding(row.module, rule, flow, interception, setting, row.inherited)
            if not row.inside:
                self._bindings.append(binding)
            else:
                self._inside.append(binding)

    @property
    def reference(self) -> Reference | None:
        """What the calls of a run meet on a reference, if differences from one are explained."""
        return self.setting.reference

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """All modules of the model."""
        return self._modules

    def require_seen(self, modules: Sequence[nn.Module], name: str) -> None:
        """Raise where nothing of modules is seen, since one around them runs as a unit.

        Args:
            modules: that give or take what is asked for.
            name: what it is called.

        Raises:
            ValueError: a module around it has a rule.
        """
        around = {id(binding.module) for binding in self._bindings if not binding.rule.opens}
        for row in self.rows:
            if id(row.module) not in around:
                continue
            inside = set(map(id, row.module.modules())) - {id(row.module)}
            if all(id(module) in inside for module in modules):
                raise ValueError(
                    f"{name!r} is inside {row.path or 'the model'!r} ({type(row.module).__name__}), which runs as one "
                    f"under {row.rule!r}, so that nothing inside has relevance of its own: name {row.path!r}, or give "
                    "the modules inside it rules in its place"
                )

    def attach(self) -> ExitStack | None:
        """Run the model under the rules until they are taken off; operations only :meth:`within` it.

        Returns:
            What is to be closed before that, if anything is.
        """
        overwriting: list[nn.Module] = []
        for module in self._units:
            if module.__dict__.get("inplace") is True and overwrites(module):
                overwriting.append(module)
        if self.interception is not None:
            self.interception.dependence.begin()
            self.interception.outdated.layers = set(map(id, overwriting))
            self.interception.norms.begin(self._inside, self._modules)
        if self._weights is not None:
            self._weights.begin()
        if self.reference is not None:
            self.reference.begin()
        if self.setting.merges is not None:
            self.setting.merges.forget()
        Binding.attach_all(self._bindings, get_ident())
        if not (overwriting or self._lent or self._custom):
            return None
        with ExitStack() as around:
            if overwriting:
                around.enter_context(out_of_place(overwriting))
            if self._lent:
                # What hangs on the outputs of layers would be lost with views that are overwritten.
                around.enter_context(copying())
            for rule, module in self._custom:
                around.enter_context(rule.register(module))
            return around.pop_all()

    @contextmanager
    def still_attached(self) -> Iterator[None]:
        """See to it that the rules are on in a run within another one, for which the model was put back as it was."""
        off: list[Callable[[], None]] = []

        def take_off() -> None:
            for undo in off:
                undo()

        with undone(take_off):
            for binding in self._bindings:
                off.append(binding.put_back())
            yield

    def detach(self) -> None:
        """Take the rules off, as far as they are on."""
        Binding.detach_all(reversed(self._bindings))
        if self.interception is not None:
            self.interception.dependence.end()
        if self._weights is not None:
            self._weights.end()
        if self.reference is not None:
            self.reference.begin()
        if self.setting.merges is not None:
            self.setting.merges.forget()

    def rules_on(self, ledger: Ledger | None = None, *, observer: Observer | None = None) -> RulesOn:
        """How to run the model under its rules.

        Args:
            ledger: what keeps accounts of the run.
            observer: what takes note of its calls instead.
        """
        # What is behind the explained values may decide something else on a reference, and has no part in it.
        whole = observer is not None or (ledger is not None and self.reference is None)
        return RulesOn(self, ledger or observer, whole)

    def relevance(self, value: Tensor, found: Tensor) -> Tensor:
        """The relevance of a value, given what the backward pass brought to it.

        In the gradient flow that is value times gradient, unless the gradient is the result: that of a rule that makes
        it a modified one, and of a mapper, which says what is meant by its rules.
        """
        as_it_is = self.flow == "relevance" or self.interception is None or self.sensitivity
        return found if as_it_is else finite_product(value.detach(), found)

    def within(self, *, tracked: bool = False) -> AbstractContextManager[None]:
        """Run operations under their rules; ``tracked`` where the path of each has to be known."""
        return nullcontext() if self.interception is None else self.interception.running(tracked=tracked)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.operations or self.rows)

    def __len__(self) -> int:
        return len(self.operations or self.rows)

    def __str__(self) -> str:
        cells = [COLUMNS, *map(self.cells, self)]
        widths = [max(len(cell[i]) for cell in cells) for i in range(4)]
        lines = [
            "  ".join([*(c.ljust(w) for c, w in zip(cell, widths, strict=False)), cell[4]]) for cell in cells
        ]
        return "\n".join(line.rstrip() for line in [f"flow: {self.flow}", *lines])

    def _repr_html_(self) -> str:
        return html_table(f"flow: {self.flow}", COLUMNS, map(self.cells, self))

    def cells(self, row: Row) -> tuple[str, str, str, str, str]:
        """One row in words, in the order of :data:`COLUMNS`."""
        path, kind = row.path or "(model)", type(row.module).__name__
        if row.rule is None:
            unruled = "none: plain gradient" if self.interception is None else "those of its operations"
            return path, kind, unruled if row.open else "", "", ""
        if row.operation is not None:
            kind += "()"
        because = "default" if row.selector is None else repr(row.selector)
        if isinstance(row.selector, Unmatched):
            because = "nothing is known of it: as arithmetic"
        because += "" if row.runs else " (never called)"
        if row.rule.native and row.operation is not None and row.selector is None:
            if row.operation in WINNER:
                return path, kind, "picks values", "", ""
            plain = self.sensitivity and row.operation not in MOVES
            return path, kind, "none: plain gradient" if plain else "moves data", "", ""
        convention = "" if row.rule.native or row.rule.absorbs_all else row.rule.convention
        return path, kind, repr(row.rule), convention, because


def _is_left_to_operations(module: nn.Module) -> bool:
    """Whether to ignore a module is to leave it to its operations: it is a layer of torch's, or derives from one."""
    bases = (base.__module__ for base in type(module).__mro__)
    derives = any(base.startswith("torch.nn.") and base not in _NO_LAYERS for base in bases)
    return derives or home_of(module).startswith("torch.nn.")


_NO_LAYERS = ("torch.nn.modules.module", "torch.nn.modules.container")
