"""Making a plan: a composite or a mapper is asked for the rule of every module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase, TensorDictParams
from torch import nn

from tdhook.conventions import Convention
from tdhook.models.around import AroundModel
from tdhook.models.entries import dense_copy
from tdhook.models.families import BatchNorm
from tdhook.models.holding import modules_of
from tdhook.models.model import Model
from tdhook.models.tracing import Execution, registered, traced
from tdhook.relevance.composites.composite import Composite
from tdhook.relevance.operations.asking import Asking
from tdhook.relevance.operations.interception import Interception
from tdhook.relevance.plans.plan import Merge, Plan, Row
from tdhook.relevance.propagation.call import Setting
from tdhook.relevance.propagation.formula import PropagationRule
from tdhook.relevance.propagation.merges import Merges
from tdhook.relevance.propagation.params import require_parameters
from tdhook.relevance.propagation.reference import Reference
from tdhook.relevance.propagation.rule import Rule
from tdhook.relevance.propagation.stabilisers import rounding
from tdhook.relevance.propagation.weights import WeightCache
from tdhook.relevance.rules.batchnorm import merging_function
from tdhook.relevance.rules.epsilon import EpsilonRule
from tdhook.relevance.rules.simple import PassRule
from tdhook.selectors import Selector, SelectorLike, Type, as_selector

__all__ = ["DEFAULTS", "make_plan", "observe", "select"]

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


def make_plan(
    execution: Execution,
    mapper: Mapper | None,
    *,
    defaults: bool,
    skip: Callable[[str, nn.Module], bool] | None,
    flow: Convention | None,
    merge_batch_norm: bool | Sequence[Merge],
    unmatched: Callable[[str, str], None],
    cache_weights: bool = True,
    against: bool = False,
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
        unmatched: told ``(operation, path)`` of operations that nothing is known of.
        cache_weights: whether modified weights are kept from call to call.
        against: whether differences from a reference are explained, and not values.

    Raises:
        TypeError: the mapper returned something else than a rule.
        ValueError: a rule treats parameters as zero that no module under it has.
    """
    rows: list[Row] = []
    units: dict[str, set[int]] = {}
    root = execution.modules.get("")
    whole = root.around.root if isinstance(root, AroundModel) else root
    for name, module in execution.modules.items():
        if skip is not None and skip(name, module):
            continue
        # What is spliced in behind a unit has its name, but is none of its modules.
        if defaults and any(name.startswith(unit) and id(module) in own for unit, own in units.items()):
            continue
        selector, rule = _ask(mapper, execution, name, module)
        if rule is not None and not isinstance(rule, Rule):
            raise TypeError(f"the rule mapper returned {rule!r} for module `{name}`, which is no rule")
        inherited = selector is not None and selector.inherited(execution.site(name))
        to_inside = defaults and (rule is None or (inherited and not rule.native))
        norm = BatchNorm.inside(module) if to_inside else None
        if norm is not None:
            selector, rule, inherited = None, None, False
        if rule is not None and defaults:
            if module is whole:
                rows.clear()  # all that runs is inside it
            if not (inherited and rule.enters(module, inherited) and not rule.enters(module)):
                units[f"{name}." if name else ""] = set(map(id, modules_of(module).values()))
        leaf = not any(True for _ in module.children())
        leaf = leaf and not isinstance(module, TensorDictModuleBase | TensorDictParams)
        rows.append(Row(name, module, rule, selector, open=rule is None and leaf, inherited=inherited))
        if norm is not None:
            found = isinstance(mapper, Composite) and mapper.find(replace(execution.site(name), module=norm))
            selector, rule = found or (None, None)
            rows.append(Row(name, norm, rule, selector, open=rule is None, inside=True))
    _require_parameters(rows)
    composite = mapper if isinstance(mapper, Composite) else Composite()
    rules = [row.rule for row in rows if row.rule is not None] + [rule for _, rule in composite.on_operations]
    if flow is None:
        # With a mapper what arrives is written as it is, so that the flow tells what is meant.
        flow = _flow_of(rules, damped=defaults, against=against)
    sensitivity = any(rule.yields == "sensitivity" for rule in rules)
    if defaults and not sensitivity:
        rows = [_by_default(row) for row in rows]
    rows = [row for row in rows if not row.inside or _is_ruled(row.rule)]
    called = set(execution.order)
    rows = [replace(row, runs=row.path in called) for row in rows]
    rank = {name: i for i, name in reversed(list(enumerate(execution.order)))}
    rows.sort(key=lambda row: rank.get(row.path, len(rank)))
    weights = WeightCache(row.module for row in rows if row.rule is not None) if cache_weights else None
    norms = any(isinstance(module, BatchNorm.members) for module in execution.modules.values())
    merging_any = Merges(used=norms) if merge_batch_norm else None
    setting = Setting(None, weights, merging_any, Reference() if against else None)
    if setting.reference is not None:
        setting.reference.handles.used = any(rule.reveals for rule in rules)
    merges: dict[str, list[nn.Module]] = {}
    if not isinstance(merge_batch_norm, bool):
        merges = _named_merges(merge_batch_norm, execution)
    interception = None
    if defaults and (composite.on_operations or not sensitivity):
        selectors = [selector for selector, _ in composite.on_operations]
        asking = Asking(
            _Lookup(composite, execution) if selectors else None,
            by_path=any(selector.depends_on_path for selector in selectors),
            ordered=any(selector.orders_operations for selector in selectors),
        )
        interception = Interception(
            flow,
            execution.modules,
            asking,
            defaults=not sensitivity,
            unmatched=unmatched,
            setting=setting,
            batch_norm=_of_function(merge_batch_norm, composite, execution),
        )
    return Plan(
        rows,
        execution.modules.values(),
        flow,
        merges,
        bool(merge_batch_norm),
        sensitivity,
        interception,
        setting,
        execution if interception is not None and interception.asking.ordered else None,
    )


def _flow_of(rules: Sequence[Rule], damped: bool, against: bool) -> Convention:
    """The gradient flow if there is a rule for it and none that would have to be converted.

    Args:
        rules: the rules.
        damped: whether epsilon's stabiliser may be a factor there.
        against: whether differences are explained: then all that no rule is for is done there.
    """
    # Nothing, and no relevance, are the same in both conventions.
    telling = [rule for rule in rules if not (rule.native or rule.absorbs_all)]
    if not against and not any(rule.convention == "gradient" for rule in telling):
        return "relevance"

    def fits(rule: Rule) -> bool:
        if rule.convention == "gradient":
            return True
        return "gradient" in rule.conventions if damped else rule.in_both

    return "gradient" if all(map(fits, telling)) else "relevance"


def _of_function(merge: bool | Sequence[Merge], composite: Composite, execution: Execution) -> Rule | None:
    """The rule of a batch norm that is called as a function, if it is merged: as one of torch's that passes is."""
    site = replace(execution.site(""), module=nn.BatchNorm2d(1))
    rule = (composite.find(site) or (None, DEFAULTS("", site.module)))[1]
    return merging_function() if merge is True and type(rule) is PassRule else None


@dataclass(frozen=True)
class _Lookup:
    """Asks a composite for the rule of an operation."""

    composite: Composite
    execution: Execution

    def __call__(
        self, operation: str, path: str, module: nn.Module, number: int
    ) -> tuple[Selector | None, Rule | None]:
        site = self.execution.operation(operation, path, module, number)
        return self.composite.find(site) or (None, None)


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
    return traced(model.root, model.runner, lambda: model.tried(work))


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


def _require_parameters(rows: Sequence[Row]) -> None:
    """Raise where what a rule treats as zero is no parameter of any module that has a rule of that kind."""
    ruled: dict[tuple[str, ...], list[nn.Module]] = {}
    for row in rows:
        if isinstance(row.rule, PropagationRule) and row.rule.zero_params:
            ruled.setdefault(row.rule.zero_params, []).append(row.module)
    for names, modules in ruled.items():
        require_parameters(names, modules)


def _by_default(row: Row) -> Row:
    if not row.open:
        return row
    rule = DEFAULTS(row.path, row.module)
    return row if rule is None else replace(row, rule=rule, open=False)


def _is_ruled(rule: Rule | None) -> bool:
    """Whether a rule says more of a layer than those of its operations do."""
    return not (rule is None or rule.native or rule.binds_itself)


def _named_merges(merges: Sequence[Merge], execution: Execution) -> dict[str, list[nn.Module]]:
    found: dict[str, list[nn.Module]] = {}
    for linears, batch_norm in merges:
        names = [linears] if isinstance(linears, str) else list(linears)
        for name in (*names, batch_norm):
            if name not in execution.modules:
                raise ValueError(f"merge_batch_norm names {name!r}, which is no module of this model")
        if not isinstance(execution.modules[batch_norm], BatchNorm.members):
            kind = type(execution.modules[batch_norm]).__name__
            raise ValueError(f"merge_batch_norm: {batch_norm!r} is a {kind}, not a batch norm")
        found[batch_norm] = [execution.modules[name] for name in names]
    return found
