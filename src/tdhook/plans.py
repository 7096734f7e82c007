"""Plans: which module of a model runs under which rule, worked out once and attached for each call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase, TensorDictParams
from torch import nn

from tdhook.attribution.lrp_helpers.batchnorm import merging
from tdhook.attribution.lrp_helpers.binding import Binding
from tdhook.attribution.lrp_helpers.operation import Operation
from tdhook.attribution.lrp_helpers.params import rounding
from tdhook.attribution.lrp_helpers.propagation import out_of_place, overwrites
from tdhook.attribution.lrp_helpers.rule import Convention, Rule
from tdhook.attribution.lrp_helpers.rules.epsilon import EpsilonRule
from tdhook.attribution.lrp_helpers.rules.simple import IgnoreRule, PassRule, StopRule
from tdhook.attribution.lrp_helpers.types import BatchNorm
from tdhook.attribution.lrp_helpers.weights import WeightCache
from tdhook.composites import Composite
from tdhook.contexts import Model
from tdhook.operations.interception import Interception, Unmatched
from tdhook.operations.table import MOVES, WINNER
from tdhook.selectors import Selector, SelectorLike, Type, as_selector
from tdhook.state import dense_copy, frozen
from tdhook.tracing import Execution, registered, traced

__all__ = ["COLUMNS", "DEFAULTS", "Merge", "Plan", "Row", "make_plan", "observe", "select"]

Merge: TypeAlias = "tuple[str | Sequence[str], str]"
Mapper: TypeAlias = "Callable[[str, nn.Module], Rule | None]"

DEFAULTS = Composite(
    [
        (Type(BatchNorm), PassRule()),
        # Activations that are written out by hand. The last two are how torchrl's actors make a scale of an output.
        (Type("transformers.activations.*", "biased_softplus", "expln"), PassRule()),
        # Distributions compute with autograd functions of their own, which only their module can be ruled for.
        (Type("ProbabilisticTensorDictModule"), EpsilonRule(rounding)),
    ]
)
"""What modules get that a composite leaves open; the operations inside the others have defaults of their own."""


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
    """

    path: str
    module: nn.Module
    rule: Rule | None
    selector: Selector | Unmatched | None = None
    open: bool = False
    runs: bool = True

    @property
    def operation(self) -> str | None:
        """The name of the operation; ``None`` for a module."""
        return self.module.name if isinstance(self.module, Operation) else None


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
        weights: keeps modified weights, if any.

    Attributes:
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
        weights: WeightCache | None = None,
    ) -> None:
        self.rows = tuple(rows)
        self.operations: tuple[Row, ...] = ()
        self.flow: Convention = flow
        self.interception = interception
        self._modules = tuple(modules)
        self.sensitivity = sensitivity
        self.weights = weights
        # Layers without a rule may overwrite what they are given: their operations are seen.
        self._units = [row.module for row in rows if interception is None or row.rule is not None]
        self._bindings: list[Binding] = []
        self._custom: list[tuple[Rule, nn.Module]] = []
        for row in rows:
            rule = row.rule
            # To ignore a layer of torch's own is to leave it to the rule of its operation.
            own = type(row.module).__module__.startswith("torch.nn.")
            if rule is None or (isinstance(rule, IgnoreRule) and (own or interception is None)):
                continue
            if not isinstance(rule, IgnoreRule) and type(rule).register is not Rule.register:
                self._custom.append((rule, row.module))
                continue
            if type(rule) is PassRule and isinstance(row.module, BatchNorm):
                if row.path in merges:
                    rule = merging(merges[row.path])
                elif merge:
                    rule = merging()
            self._bindings.append(Binding(row.module, rule, flow, interception))

    def attach(self, stack: ExitStack) -> None:
        """Run the model under the rules until ``stack`` is closed; operations only :meth:`within` it."""
        overwriting = [module for module in self._units if overwrites(module)]
        if self.interception is not None:
            stack.enter_context(frozen(self._modules))
            self.interception.outdated.layers = set(map(id, overwriting))
        if overwriting:
            stack.enter_context(out_of_place(overwriting))
        if self.weights is not None:
            stack.enter_context(self.weights.active())
        stack.callback(self._detach)
        for binding in self._bindings:
            binding.attach()
        for rule, module in self._custom:
            stack.enter_context(rule.register(module))

    def _detach(self) -> None:
        for binding in reversed(self._bindings):
            binding.detach()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Take down the operations of the forward pass within as :attr:`operations`."""
        if self.interception is None:
            yield
            return
        watch = _Watch(self)
        self.interception.observer = watch
        try:
            yield
        finally:
            self.interception.observer = None
        called = {id(row.module) for row in watch.rows}
        ruled = (row for row in self.rows if row.rule and not isinstance(row.rule, IgnoreRule))
        idle = (replace(row, runs=False) for row in ruled if id(row.module) not in called)
        self.operations = (*watch.rows, *idle)

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
        if isinstance(row.rule, IgnoreRule) and row.operation is not None and row.selector is None:
            if row.operation in WINNER:
                return path, kind, "picks values", "", ""
            plain = self.sensitivity and row.operation not in MOVES
            return path, kind, "none: plain gradient" if plain else "moves data", "", ""
        convention = "" if isinstance(row.rule, IgnoreRule | StopRule) else row.rule.convention
        return path, kind, repr(row.rule), convention, because


class _Watch:
    """Takes down the calls of a forward pass."""

    def __init__(self, plan: Plan) -> None:
        self.rows: list[Row] = []
        self._known = {id(row.module): row for row in plan.rows}

    def call(
        self,
        path: str,
        module: nn.Module,
        selector: Selector | Unmatched | None,
        rule: Rule,
        flow: Convention,
        original: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Make one call and take it down."""
        self.rows.append(self._known.get(id(module), Row(path, module, rule, selector)))
        return rule.run_in(flow, module, original, args, kwargs)

    def again(self) -> AbstractContextManager[None]:
        """A rehearsal has no backward pass, in which anything would be run once more."""
        return nullcontext()


def make_plan(
    execution: Execution,
    mapper: Mapper | None,
    *,
    defaults: bool,
    skip: Callable[[str, nn.Module], bool] | None,
    flow: Convention | None,
    merge_batch_norm: bool | Sequence[Merge],
    unmatched: Callable[[str, str, bool], None],
    cache_weights: bool = True,
) -> Plan:
    """Ask a composite or a mapper for the rule of every module.

    Args:
        execution: the model, and what is known of how it runs.
        mapper: a composite, which sees the whole model, or any ``(name, module) -> Rule or None``.
        defaults: whether what is left open gets the obvious rule; then a module that has a rule is one unit, whose
            inside is not looked at again.
        skip: modules to leave alone.
        flow: the convention of the backward pass, or ``None`` to follow from the rules.
        merge_batch_norm: whether to merge batch norms, or which.
        unmatched: told ``(operation, path, unseen)`` of operations that nothing is known of.
        cache_weights: whether modified weights are kept from call to call.

    Raises:
        TypeError: the mapper returned something else than a rule.
    """
    rows: list[Row] = []
    units: list[str] = []
    for name, module in execution.modules.items():
        if skip is not None and skip(name, module):
            continue
        if defaults and any(name.startswith(unit) for unit in units):
            continue
        selector, rule = _ask(mapper, execution, name, module)
        if rule is not None and not isinstance(rule, Rule):
            raise TypeError(f"the rule mapper returned {rule!r} for module `{name}`, which is no rule")
        if rule is not None and defaults:
            units.append(f"{name}." if name else "")
        leaf = not any(True for _ in module.children())
        leaf = leaf and not isinstance(module, TensorDictModuleBase | TensorDictParams)
        rows.append(Row(name, module, rule, selector, open=rule is None and leaf))
    composite = mapper if isinstance(mapper, Composite) else Composite()
    rules = [row.rule for row in rows if row.rule is not None] + [rule for _, rule in composite.on_operations]
    if flow is None:
        # With a mapper what arrives is written as it is, so that the flow tells what is meant.
        flow = _flow_of(rules, damped=defaults)
    sensitivity = any(rule.yields == "sensitivity" for rule in rules)
    if defaults and not sensitivity:
        rows = [_by_default(row) for row in rows]
    called = set(execution.order)
    rows = [replace(row, runs=row.path in called) for row in rows]
    rank = {name: i for i, name in reversed(list(enumerate(execution.order)))}
    rows.sort(key=lambda row: rank.get(row.path, len(rank)))
    merges: dict[str, list[nn.Module]] = {}
    if not isinstance(merge_batch_norm, bool):
        merges = _named_merges(merge_batch_norm, execution)
    interception = None
    if defaults and (composite.on_operations or not sensitivity):
        interception = Interception(
            flow,
            execution.modules,
            _Lookup(composite, execution) if composite.on_operations else None,
            by_path=any(selector.depends_on_path for selector, _ in composite.on_operations),
            defaults=not sensitivity,
            unmatched=unmatched,
        )
    return Plan(
        rows,
        execution.modules.values(),
        flow,
        merges,
        bool(merge_batch_norm),
        sensitivity,
        interception,
        WeightCache() if cache_weights else None,
    )


def _flow_of(rules: Sequence[Rule], damped: bool) -> Convention:
    """The gradient flow if there is a rule for it and none that would have to be converted.

    Args:
        rules: the rules.
        damped: whether epsilon's stabiliser may be a factor there.
    """
    # Nothing, and no relevance, are the same in both conventions.
    telling = [rule for rule in rules if not isinstance(rule, IgnoreRule | StopRule)]
    if not any(rule.convention == "gradient" for rule in telling):
        return "relevance"

    def fits(rule: Rule) -> bool:
        damps = damped and isinstance(rule, EpsilonRule) and not rule.zero_params
        return rule.convention == "gradient" or rule.in_both or damps

    return "gradient" if all(map(fits, telling)) else "relevance"


@dataclass(frozen=True)
class _Lookup:
    """Asks a composite for the rule of an operation."""

    composite: Composite
    execution: Execution

    def __call__(self, operation: str, path: str, module: nn.Module) -> tuple[Selector | None, Rule | None]:
        return self.composite.find(self.execution.operation(operation, path, module)) or (None, None)


def select(
    selector: SelectorLike, module: nn.Module, td: TensorDictBase | None = None
) -> dict[str, nn.Module]:
    """What a selector means in a model: its modules by path, in execution order.

    Args:
        selector: a selector, or what stands for one.
        module: the model.
        td: input to run it on; without it, registration order stands in for execution order.
    """
    wanted = as_selector(selector)
    execution = observe(Model.of(module), td)
    names = dict.fromkeys([*execution.order, *execution.modules])
    return {name: execution.modules[name] for name in names if wanted.matches(execution.site(name))}


def observe(model: Model, td: TensorDictBase | None) -> Execution:
    """How a model runs: watched on ``td``, or as registration order suggests."""
    if td is None:
        return registered(model.root, model.runner)
    work = dense_copy(td)
    return traced(model.root, model.runner, lambda: model.run(work))


def _ask(
    mapper: Mapper | None, execution: Execution, name: str, module: nn.Module
) -> tuple[Selector | None, Rule | None]:
    if mapper is None:
        return None, None
    if isinstance(mapper, Composite):
        if (
            getattr(type(module), "forward", None) is nn.Module.forward
        ):  # a list of modules, say: it is never called
            return None, None
        return mapper.find(execution.site(name)) or (None, None)
    return None, mapper(name, module)


def _by_default(row: Row) -> Row:
    if not row.open:
        return row
    rule = DEFAULTS(row.path, row.module)
    return row if rule is None else replace(row, rule=rule, open=False)


def _named_merges(merges: Sequence[Merge], execution: Execution) -> dict[str, list[nn.Module]]:
    found: dict[str, list[nn.Module]] = {}
    for linears, batch_norm in merges:
        names = [linears] if isinstance(linears, str) else list(linears)
        for name in (*names, batch_norm):
            if name not in execution.modules:
                raise ValueError(f"merge_batch_norm names {name!r}, which is no module of this model")
        if not isinstance(execution.modules[batch_norm], BatchNorm):
            kind = type(execution.modules[batch_norm]).__name__
            raise ValueError(f"merge_batch_norm: {batch_norm!r} is a {kind}, not a batch norm")
        found[batch_norm] = [execution.modules[name] for name in names]
    return found
