"""Plans: which module of a model runs under which rule, worked out once and attached for each call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TypeAlias

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase, TensorDictParams
from torch import nn

from tdhook.attribution.lrp_helpers.batchnorm import merging
from tdhook.attribution.lrp_helpers.binding import Binding
from tdhook.attribution.lrp_helpers.layers import Sum
from tdhook.attribution.lrp_helpers.propagation import out_of_place
from tdhook.attribution.lrp_helpers.rule import Convention, Rule
from tdhook.attribution.lrp_helpers.rules.gradient import LayerNormRule
from tdhook.attribution.lrp_helpers.rules.linear import NormRule, SoftmaxEpsilonRule
from tdhook.attribution.lrp_helpers.rules.simple import IgnoreRule, PassRule, StopRule
from tdhook.attribution.lrp_helpers.types import Activation, AvgPool, BatchNorm, MaxPool
from tdhook.composites import Composite
from tdhook.contexts import Model
from tdhook.selectors import Selector, SelectorLike, Type, as_selector
from tdhook.state import dense_copy
from tdhook.tracing import Execution, registered, traced

__all__ = ["DEFAULTS", "Merge", "Plan", "Row", "make_plan", "observe", "select"]

Merge: TypeAlias = "tuple[str | Sequence[str], str]"
Mapper: TypeAlias = "Callable[[str, nn.Module], Rule | None]"

_DATA_MOVEMENT = Type(
    *(
        nn.Identity,
        nn.Flatten,
        nn.Unflatten,
        nn.Unfold,
        nn.PixelShuffle,
        nn.PixelUnshuffle,
        nn.ChannelShuffle,
    ),
    *("*Pad1d", "*Pad2d", "*Pad3d", "torchrl.*.Squash*", "torchrl.*.Squeeze*"),
)
_DROPOUT = Type(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)

DEFAULTS = Composite(
    [
        # The last two are how torchrl's actors make a scale of what a network gave.
        (Type(Activation, BatchNorm, "biased_softplus", "expln"), PassRule()),
        (_DATA_MOVEMENT | _DROPOUT | Type(MaxPool, nn.Embedding, nn.EmbeddingBag), IgnoreRule()),
        ((Sum, AvgPool, nn.Upsample, nn.Fold), NormRule()),
        (Type(nn.LayerNorm, "*RMSNorm"), LayerNormRule()),
        (nn.Softmax, SoftmaxEpsilonRule()),
    ]
)
"""What modules get that a composite leaves open, in the relevance flow."""


@dataclass(frozen=True)
class Row:
    """What a plan says of one module.

    Attributes:
        path: dotted path of the module.
        module: the module.
        rule: its rule, if any.
        selector: the selector that matched; ``None`` for a default and for a rule from a mapper.
        open: whether it is a layer that nothing says anything about.
        runs: whether the model called it, as far as that is known.
    """

    path: str
    module: nn.Module
    rule: Rule | None
    selector: Selector | None = None
    open: bool = False
    runs: bool = True


class Plan:
    """The rows for one model, in execution order where it is known, and the flow that follows from them.

    Args:
        rows: one per module that has a rule, or could have one.
        flow: the convention of the backward pass.
        merges: batch norms to merge by name: path of the batch norm to the linear layers.
        merge: whether batch norms right behind a linear layer are merged.
    """

    def __init__(
        self, rows: Sequence[Row], flow: Convention, merges: dict[str, list[nn.Module]], merge: bool
    ) -> None:
        self.rows = tuple(rows)
        self.flow: Convention = flow
        self.sensitivity = any(row.rule is not None and row.rule.yields == "sensitivity" for row in rows)
        self._bindings: list[Binding] = []
        self._custom: list[tuple[Rule, nn.Module]] = []
        for row in rows:
            rule = row.rule
            if rule is None or isinstance(rule, IgnoreRule):
                continue
            if type(rule).register is not Rule.register:
                self._custom.append((rule, row.module))
                continue
            if type(rule) is PassRule and isinstance(row.module, BatchNorm) and flow == "relevance":
                if row.path in merges:
                    rule = merging(merges[row.path])
                elif merge:
                    rule = merging()
            self._bindings.append(Binding(row.module, rule, flow))

    def attach(self, stack: ExitStack) -> None:
        """Run the model under the rules until ``stack`` is closed."""
        stack.enter_context(out_of_place(row.module for row in self.rows))
        for binding in self._bindings:
            binding.attach()
            stack.callback(binding.detach)
        for rule, module in self._custom:
            stack.enter_context(rule.register(module))

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        cells = [("module", "type", "rule", "because")]
        for row in self.rows:
            because = "" if row.rule is None else "default" if row.selector is None else repr(row.selector)
            because += "" if row.rule is None or row.runs else " (never called)"
            nothing = "none: plain gradient" if row.open else ""
            rule = nothing if row.rule is None else repr(row.rule)
            cells.append((row.path or "(model)", type(row.module).__name__, rule, because))
        widths = [max(len(cell[i]) for cell in cells) for i in range(3)]
        lines = [
            "  ".join([*(c.ljust(w) for c, w in zip(cell, widths, strict=False)), cell[3]]) for cell in cells
        ]
        return "\n".join(line.rstrip() for line in [f"flow: {self.flow}", *lines])


def make_plan(
    execution: Execution,
    mapper: Mapper | None,
    *,
    defaults: bool,
    skip: Callable[[str, nn.Module], bool] | None,
    flow: Convention | None,
    merge_batch_norm: bool | Sequence[Merge],
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
    # Nothing, and no relevance, are the same in both conventions.
    rules = [
        row.rule for row in rows if row.rule is not None and not isinstance(row.rule, IgnoreRule | StopRule)
    ]
    if flow is None:
        flow = "gradient" if rules and all(rule.convention == "gradient" for rule in rules) else "relevance"
    if defaults and flow == "relevance":
        rows = [_by_default(row) for row in rows]
    called = set(execution.order)
    rows = [replace(row, runs=row.path in called) for row in rows]
    rank = {name: i for i, name in reversed(list(enumerate(execution.order)))}
    rows.sort(key=lambda row: rank.get(row.path, len(rank)))
    merges: dict[str, list[nn.Module]] = {}
    if not isinstance(merge_batch_norm, bool):
        merges = _named_merges(merge_batch_norm, execution)
    return Plan(rows, flow, merges, bool(merge_batch_norm))


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
        if type(module).forward is nn.Module.forward:  # a list of modules, say: it is never called
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
