"""Layer-wise relevance propagation."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor, nn

from tdhook.contexts.attribution import Attribution, Conditions, Record
from tdhook.conventions import Convention
from tdhook.models.families import Linear
from tdhook.models.model import InKeys, Model
from tdhook.passes.graphs import Compile
from tdhook.relevance.composites.composite import Composite, Pairs, preset
from tdhook.relevance.ledger.ledger import Ledger
from tdhook.relevance.plans.making import make_plan, observe
from tdhook.relevance.plans.plan import Merge, Plan
from tdhook.relevance.plans.rehearsal import watched
from tdhook.relevance.propagation.formula import PropagationRule
from tdhook.relevance.propagation.rule import Rule
from tdhook.tape.overwriting import Mutated, was_overwritten
from tdhook.targets import Seeds, TargetLike, as_seeder

__all__ = ["LRP"]

Init = Callable[[TensorDictBase, TensorDictBase], TensorDictBase]


@dataclass
class _State:
    """What LRP knows about one model: which rule each module gets, and whether that was seen in execution."""

    plan: Plan
    executed: bool
    seen: bool = False


class LRP(Attribution):
    """Layer-wise relevance propagation (Bach et al. 2015).

    Args:
        composite: what happens where: a :class:`~tdhook.composites.Composite`, a list of ``(selector, rule)``, or the
            name of a preset.
        target: what is explained (:mod:`tdhook.targets`); by default the only output there is.
        attribute: keys to give relevance for: those that the model reads (the default), keys that a
            ``TensorDictModule`` inside it writes, or ``"all"`` of these.
        attribution_key: where relevance is written: that of ``key`` under ``(attribution_key, key)``.
        input_modules: paths of modules whose outputs get relevance, under ``(attribution_key, path)``.
        flow: the convention in which the backward pass runs; by default ``"gradient"`` if all rules are in that
            convention, else ``"relevance"``. Rules of the other one are converted.
        merge_batch_norm: whether a batch norm right behind a linear layer is merged into it; or pairs
            ``(path of the linear layer, or several, path of the batch norm)`` to merge where something lies between.
        rule_mapper: ``(name, module) -> Rule or None`` instead of a composite.
        init_attr_targets: ``(outputs, extra) -> targets``, the tensors to explain, instead of ``target``.
        init_attr_inputs: ``(inputs, extra) -> inputs``, those to attribute.
        init_attr_grads: ``(targets, extra) -> relevance`` to start from; ones by default.
        additional_init_keys: the keys that make up ``extra``.
        use_inputs: whether inputs get relevance.
        use_outputs: whether the outputs are offered to ``init_attr_targets`` (``target_modules`` always are).
        target_modules: paths of modules whose outputs are offered as targets.
        clean_intermediate_keys: whether to leave out the copies of inputs and outputs under ``_mod_in``, ``_mod_out``.
        warn_on_missing_rule: whether to warn of modules without rule; by default, with a composite, of layers alone.
        skip_modules: ``(name, module) -> bool``, modules that get no rule and no warning.
        on_unmatched: what to do where the model calls a torch function on the way that nothing is known of: warn once
            and treat it as arithmetic (the generic epsilon rule), raise, or treat it so without a word.
        ledger: whether to account for all relevance, per batch element: ``("ledger", "target")`` is what was put in,
            ``("ledger", "inputs")`` what arrived, ``("ledger", "absorbed")`` what rules kept on purpose, and
            ``("ledger", "gap")`` what was lost or made. It takes two more backward passes for each 128 batch elements.
        compile: whether to run as one graph: ``True``, or a mode or a dictionary of options of ``torch.compile``. The
            first call compiles, which takes seconds; where that cannot be done a warning says why, once.
        memory_budget: bytes that the gradients of several targets (``index="all"``) may take together, counted as four
            times the largest of them; as many targets as fit share one backward pass. By default 32 MiB on a CPU (more
            does not fit its caches, and takes longer) and 1 GiB elsewhere; 0 for one target at a time.
        cache_weights: whether the weights that rules modify (large ones, on the CPU) are kept from call to call, until
            the parameters change: as much memory again as those, for each modification.

    With a composite, modules that it leaves open are entered, and each operation in them that it leaves open has the
    obvious rule (:mod:`tdhook.relevance.operations.table`). What is written is relevance in either flow (but for
    modified gradients such as guided backpropagation, which are written as they are).

    With a ``rule_mapper``, modules left open get no rule, operations neither, the backward pass starts from ones unless
    told, and what it brings to the inputs is written as it is.
    """

    def __init__(
        self,
        composite: Composite | Pairs | str | None = None,
        *,
        target: TargetLike = None,
        attribute: Sequence[NestedKey] | str | None = None,
        attribution_key: NestedKey = "attr",
        input_modules: Sequence[str] | None = None,
        flow: Convention | None = None,
        merge_batch_norm: bool | Sequence[Merge] = True,
        rule_mapper: Callable[[str, nn.Module], Rule | None] | None = None,
        init_attr_targets: Init | None = None,
        init_attr_inputs: Init | None = None,
        init_attr_grads: Init | None = None,
        additional_init_keys: Sequence[NestedKey] | None = None,
        use_inputs: bool = True,
        use_outputs: bool = True,
        target_modules: Sequence[str] | None = None,
        clean_intermediate_keys: bool = True,
        warn_on_missing_rule: bool | None = None,
        skip_modules: Callable[[str, nn.Module], bool] | None = None,
        on_unmatched: Literal["warn", "raise", "ignore"] = "warn",
        ledger: bool = False,
        compile: Compile = False,
        memory_budget: int | None = None,
        cache_weights: bool = True,
    ) -> None:
        super().__init__(
            attribute=attribute,
            attribution_key=attribution_key,
            use_inputs=use_inputs,
            input_modules=input_modules,
            target_modules=target_modules,
            compile=compile,
            memory_budget=memory_budget,
        )
        if ledger and self.compile is not None:
            raise ValueError("a ledger cannot be compiled: leave out ledger=True or compile")
        if composite is not None and rule_mapper is not None:
            raise TypeError("give LRP a composite or a rule_mapper, not both")
        if target is not None and init_attr_targets is not None:
            raise TypeError("give LRP a target or init_attr_targets, not both")
        if flow not in (None, "relevance", "gradient"):
            raise ValueError(f"flow is 'relevance' or 'gradient', got {flow!r}")
        if on_unmatched not in ("warn", "raise", "ignore"):
            raise ValueError(f"on_unmatched is 'warn', 'raise' or 'ignore', got {on_unmatched!r}")
        self.on_unmatched = on_unmatched
        self.ledger = ledger
        self.cache_weights = cache_weights
        self.composite = None if composite is None else _as_composite(composite)
        self.rule_mapper = rule_mapper
        self.target = target
        self.flow: Convention | None = flow
        self.merge_batch_norm = merge_batch_norm
        self.init_attr_targets = init_attr_targets
        self.init_attr_inputs = init_attr_inputs
        self.init_attr_grads = init_attr_grads
        self.additional_init_keys = tuple(map(unravel_key, additional_init_keys or ()))
        self.use_outputs = use_outputs
        self.clean_intermediate_keys = clean_intermediate_keys
        self.warn_on_missing_rule = warn_on_missing_rule
        self.skip_modules = skip_modules
        # Without a composite and without a target, the backward pass starts from ones.
        self._from_ones = target is None and composite is None
        self._seeder = as_seeder(target)

    def __repr__(self) -> str:
        how = self.composite if self.composite is not None else self.rule_mapper
        return f"LRP({how!r}, target={self.target!r})"

    def explaining(self, target: TargetLike) -> LRP:
        """The same for another target."""
        other = copy.copy(self)
        other.target, other._seeder, other._from_ones = target, as_seeder(target), False
        other.init_attr_targets = other.init_attr_grads = None
        return other

    @staticmethod
    def default_skip(name: str, module: nn.Module) -> bool:
        """What merely contains other modules: a ``skip_modules``."""
        containers = (nn.ModuleList, nn.ModuleDict, nn.Sequential, TensorDictModule)
        return name in ("", "td_module", "module") or isinstance(module, containers)

    def plan(
        self,
        module: nn.Module,
        td: TensorDictBase | None = None,
        in_keys: InKeys | None = None,
        out_keys: Sequence[NestedKey] | None = None,
    ) -> Plan:
        """Which rule each module gets, and, with ``td``, each operation, in execution order.

        Without ``td``, the model is not run: registration order stands in for that of execution, and the operations are
        not known. ``in_keys`` and ``out_keys`` are those of :meth:`prepare`.
        """
        from tdhook.contexts.explained import ExplainedModule

        model = Model.of(module, in_keys, out_keys)
        plan = self._plan(model, td)
        if td is not None and plan.interception is not None:
            plain = copy.copy(self)
            plain.ledger = False
            explained = ExplainedModule(plain, model, _State(plan, executed=True))
            explained.rehearse(td, lambda: watched(plan))
        return plan

    def extra_in_keys(self) -> tuple[NestedKey, ...]:
        """Keys that the initialisers read."""
        return self.additional_init_keys

    def start(self, model: Model) -> _State:
        """Find the rules."""
        known = {unravel_key(key) for key in (*model.runner.in_keys, *model.runner.out_keys)}
        if known & set(self.additional_init_keys):
            raise ValueError("Additional init keys must not be in the in_keys or out_keys")
        needs_execution = isinstance(self._mapper, Composite) and self._mapper.needs_execution
        plan = self._plan(model, None)
        if not needs_execution:
            self._complain(plan)
        return _State(plan, executed=not needs_execution)

    @property
    def _mapper(self) -> Callable[[str, nn.Module], Rule | None] | None:
        return self.composite if self.composite is not None else self.rule_mapper

    def _plan(self, model: Model, td: TensorDictBase | None) -> Plan:
        return make_plan(
            observe(model, td),
            self._mapper,
            defaults=self.composite is not None,
            skip=self.skip_modules,
            flow=self.flow,
            merge_batch_norm=self.merge_batch_norm,
            unmatched=_Unmatched(self.on_unmatched),
            cache_weights=self.cache_weights,
        )

    def _complain(self, plan: Plan) -> None:
        composite = self.composite
        silent = composite is not None and not composite.on_operations
        layers = any(isinstance(row.module, Linear) for row in plan)
        if silent and layers and not any(row.selector is not None for row in plan):
            classes = ", ".join(sorted({type(row.module).__name__ for row in plan}))
            raise ValueError(
                f"the composite matches no module of this model:\n{self.composite!r}\nIt has {classes}."
            )
        warn = self.warn_on_missing_rule
        if warn is False:
            return
        for row in plan:
            if row.rule is None and (warn or composite is None):
                warnings.warn(
                    f"No rule found for module `{row.path}` ({type(row.module).__name__})", stacklevel=2
                )

    @contextmanager
    def active(self, state: _State, model: Model, td: TensorDictBase) -> Iterator[Conditions]:
        """Run the model under its rules."""
        if not state.executed:
            state.plan = self._plan(model, td)
            state.executed = True
            self._complain(state.plan)
        plan = state.plan
        with ExitStack() as stack:
            plan.attach(stack)
            overwrites = plan.interception is not None and plan.interception.guard.active
            # The first run tells the path of operations that nothing is known of.
            ledger = self._new_ledger(plan)
            try:
                yield Conditions(plan.flow, plan.within(tracked=not state.seen), overwrites, ledger)
            except RuntimeError as error:
                if overwrites or plan.interception is None or not was_overwritten(error):
                    raise
                plan.interception.guard.active = True
                raise Mutated from error
            state.seen = True

    def _new_ledger(self, plan: Plan) -> Ledger | None:
        if not self.ledger:
            return None
        if plan.interception is None or plan.sensitivity:
            raise ValueError(
                "ledger=True needs a composite whose result is relevance: rule mappers and modified gradients "
                "conserve none"
            )
        plan.interception.observer = ledger = Ledger()
        return ledger

    def reads_signs(self, state: _State) -> bool:
        """Rules that treat contributions by their sign skip terms."""
        return any(isinstance(row.rule, PropagationRule) and row.rule.needs_sign for row in state.plan.rows)

    def extra_out_keys(self) -> tuple[NestedKey, ...]:
        """What the target computes, and the ledger."""
        accounts = ("target", "inputs", "absorbed", "gap") if self.ledger else ()
        return (*self._seeder.writes, *(("ledger", name) for name in accounts))

    def target_entries(self) -> Sequence[NestedKey] | None:
        """Those that the target reads."""
        return self._seeder.entries

    def derive(self, outputs: TensorDictBase, inputs: TensorDictBase) -> TensorDictBase:
        """Let the target compute what it explains."""
        return self._seeder.derive(outputs, inputs)

    def differentiable(
        self, work: TensorDictBase, keys: Sequence[NestedKey], td: TensorDictBase
    ) -> Iterable[tuple[NestedKey, Tensor]]:
        """Let ``init_attr_inputs`` choose among the inputs."""
        if self.init_attr_inputs is None:
            return super().differentiable(work, keys, td)
        chosen = _tensordict(self.init_attr_inputs(work.select(*keys), self._extra(td)), "init_attr_inputs")
        return [(key, value) for key, value in chosen.items(True, True) if isinstance(value, Tensor)]

    def seeds(self, record: Record, td: TensorDictBase, flow: Convention) -> Seeds:
        """Start from the target, or from what the initialisers say."""
        outputs = record.outputs
        if self.target_modules or not self.use_outputs:
            outputs = outputs.copy() if self.use_outputs else TensorDict(batch_size=outputs.batch_size)
            for path in self.target_modules:
                outputs.set((path,), record.shaped(record.modules[path]))
        if self.init_attr_targets is None and self.init_attr_grads is None and not self._from_ones:
            return self._seeder(outputs, td, flow)
        if self.init_attr_targets is not None:
            outputs = _tensordict(self.init_attr_targets(outputs, self._extra(td)), "init_attr_targets")
        elif self.target is not None:
            selected = self._seeder(outputs, td, flow)
            outputs = outputs.select(*selected.keys)
        if self.init_attr_grads is None:
            grads: TensorDictBase = cast(TensorDictBase, torch.ones_like(outputs))
        else:
            grads = _tensordict(self.init_attr_grads(outputs, self._extra(td)), "init_attr_grads")
        keys = list(outputs.keys(True, True))
        if grads.batch_size != outputs.batch_size:
            raise ValueError("init_grads should have the same batch size as targets")
        if set(keys) != set(grads.keys(True, True)):
            raise ValueError("Targets and init_grads must have the same keys")
        return Seeds(keys, [outputs.get(key) for key in keys], [grads.get(key) for key in keys])

    def relevance(self, state: _State, value: Tensor, grad: Tensor, flow: Convention) -> Tensor:
        """In the gradient flow of a composite, relevance is value times gradient, unless the gradient is the result."""
        as_it_is = flow == "relevance" or self.composite is None or state.plan.sensitivity
        return grad if as_it_is else value * grad

    def extras(self, record: Record) -> dict[NestedKey, Any]:
        """The intermediate keys, where they are not cleaned."""
        if self.clean_intermediate_keys:
            return {}
        inputs = {key: value.detach() for key, value in record.inputs.items()}
        outputs = dict(record.outputs.detach().items(True, True))
        groups = {"_register_in": inputs, "_mod_in": inputs, "_mod_out": outputs}
        return {
            (group, *((key,) if isinstance(key, str) else key)): value
            for group, entries in groups.items()
            for key, value in entries.items()
        }

    def _extra(self, td: TensorDictBase) -> TensorDictBase:
        return td.select(*self.additional_init_keys)


class _Unmatched:
    """Reports an operation that nothing is known of, once for each place."""

    def __init__(self, how: str) -> None:
        self.how = how
        self.told: set[tuple[str, str]] = set()

    def __call__(self, operation: str, path: str, unseen: bool) -> None:
        kind = "autograd function" if unseen else "operation"
        where = f"the {kind} `{operation}` in module `{path}`" if path else f"the {kind} `{operation}`"
        if unseen:
            found = f"{where} runs under its own backward pass, where no rule sees it"
            remedy = "give the module that calls it a rule, so that it runs as one unit"
        else:
            found = f"nothing is known of {where}, which is treated as arithmetic under the epsilon rule"
            remedy = f'give it a rule, (Op("{operation}"), rule) in the composite'
        if self.how == "raise":
            raise NotImplementedError(f"{found}; {remedy}")
        # Only the first run tells paths.
        told = (operation, path) in self.told or (not path and operation in {name for name, _ in self.told})
        if self.how == "warn" and not told:
            self.told.add((operation, path))
            warnings.warn(f"{found}; {remedy}", stacklevel=2)


def _as_composite(composite: Composite | Pairs | str) -> Composite:
    if isinstance(composite, Composite):
        return composite
    if isinstance(composite, str):
        return preset(composite)
    if not isinstance(composite, Iterable):
        raise TypeError(
            f"{composite!r} is no composite; give a list of (selector, rule) or the name of a preset"
        )
    return Composite(composite)


def _tensordict(value: Any, name: str) -> TensorDictBase:
    if not isinstance(value, TensorDictBase):
        raise ValueError(f"{name} function must return a TensorDict")
    return value
