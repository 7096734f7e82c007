"""Layer-wise relevance propagation."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal, cast

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor, nn

from tdhook.attribution.against import REFERENCE, explain_difference, mean_difference
from tdhook.attribution.keywords_03 import Keywords03, copies_of, translated
from tdhook.contexts.attribution import Shared
from tdhook.contexts.compared import SPREAD, Compared
from tdhook.conventions import Convention, per_value
from tdhook.keys import under
from tdhook.models.families import Linear
from tdhook.models.lazy import initialise, is_unmade
from tdhook.models.model import InKeys, Model
from tdhook.passes.heads import NowKnown
from tdhook.passes.runner import Runner
from tdhook.passes.setup import Setup, inner_modules
from tdhook.perturbing.elsewhere import Elsewhere
from tdhook.perturbing.references import Baseline, References, as_references
from tdhook.relevance.composites.composite import Composite, Pairs, RuleMapper, preset
from tdhook.relevance.ledger.balance import balance
from tdhook.relevance.ledger.ledger import Ledger
from tdhook.relevance.ledger.report import ledger_table
from tdhook.relevance.plans.making import make_plan, observe
from tdhook.relevance.plans.plan import Merge, Plan
from tdhook.relevance.plans.rehearsal import Ready, learn_order, rehearse
from tdhook.relevance.secants.pair import difference
from tdhook.tape.undoing import Undoing
from tdhook.targets import TargetLike

if TYPE_CHECKING:
    from rich.table import Table
    from typing_extensions import Unpack

__all__ = ["LRP"]


class Options(Shared, Keywords03, total=False):
    """What :class:`LRP` takes besides the keywords of its own."""


class LRP(Compared):
    """Layer-wise relevance propagation (Bach et al. 2015).

    Args:
        composite: what happens where: a :class:`~tdhook.composites.Composite`, a list of ``(selector, rule)``, or the
            name of a preset.
        target: what is explained (:mod:`tdhook.targets`); by default the only output there is.
        baseline: what the target is compared with, so that its difference from there is explained
            (:data:`~tdhook.perturbing.references.Baseline`); by default its value is.
        samples: how many references are drawn where the baseline is drawn; relevance is the mean over them.
        flow: the convention in which the backward pass runs; by default ``"gradient"`` if all rules are in that
            convention, else ``"relevance"``. Rules of the other one are converted.
        merge_batch_norm: whether a batch norm right behind a linear layer is merged into it; or pairs
            ``(path of the linear layer, or several, path of the batch norm)`` to merge where something lies between.
        rule_mapper: ``(name, module) -> Rule or None`` instead of a composite.
        warn_on_missing_rule: whether to warn of modules without rule; by default, with a composite, of layers alone.
        skip_modules: ``(name, module) -> bool``, modules that get no rule and no warning.
        on_unmatched: what to do where the model calls a torch function on the way that nothing is known of: warn once
            and treat it as arithmetic (the generic epsilon rule), raise, or treat it so without a word.
        ledger: whether to account for all relevance, per batch element: ``("ledger", "target")`` is what was put in,
            ``("ledger", "inputs")`` what arrived, ``("ledger", "absorbed")`` what rules kept on purpose, and
            ``("ledger", "gap")`` what was lost or made. It takes two to four more backward passes of the whole batch.
            Where batch elements meet, see :attr:`~tdhook.relevance.ledger.ledger.Ledger.per_element`.
        cache_weights: whether the weights that rules modify (large ones, on the CPU) are kept from call to call, until
            the parameters change: as much memory again as those, for each modification.
        **options: those of :class:`~tdhook.contexts.attribution.Attribution` (``attribute``, ``input_modules``,
            ``values``, ``compile``, ...) and of tdhook 0.3 (:mod:`tdhook.attribution.keywords_03`).

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
        baseline: Baseline | References | None = None,
        samples: int = 1,
        flow: Convention | None = None,
        merge_batch_norm: bool | Sequence[Merge] = True,
        rule_mapper: RuleMapper | None = None,
        warn_on_missing_rule: bool | None = None,
        skip_modules: Callable[[str, nn.Module], bool] | None = None,
        on_unmatched: Literal["warn", "raise", "ignore"] = "warn",
        ledger: bool = False,
        cache_weights: bool = True,
        **options: Unpack[Options],
    ) -> None:
        shared, older = _split(options)
        found = translated(older, target, shared.get("target_modules"), from_ones=composite is None)
        if found.attribute is not None:
            shared["attribute"] = found.attribute
        super().__init__(found.target, **shared)
        if ledger and self.compile is not None:
            raise ValueError("a ledger cannot be compiled: leave out ledger=True or compile")
        if composite is not None and rule_mapper is not None:
            raise TypeError("give LRP a composite or a rule_mapper, not both")
        if flow not in (None, "relevance", "gradient"):
            raise ValueError(f"flow is 'relevance' or 'gradient', got {flow!r}")
        if on_unmatched not in ("warn", "raise", "ignore"):
            raise ValueError(f"on_unmatched is 'warn', 'raise' or 'ignore', got {on_unmatched!r}")
        self.composite = None if composite is None else _as_composite(composite)
        self.rule_mapper = rule_mapper
        self.flow: Convention | None = flow
        self.merge_batch_norm = merge_batch_norm
        self.warn_on_missing_rule = warn_on_missing_rule
        self.skip_modules = skip_modules
        self.on_unmatched = on_unmatched
        self.references = as_references(baseline, samples)
        if self.references is not None and self.composite is None:
            raise ValueError(
                "a baseline needs a composite, whose rules say what of a difference each input gets; a rule_mapper "
                "leaves operations open"
            )
        self.ledger = ledger
        self.cache_weights = cache_weights
        self._copies = found.copies

    def __repr__(self) -> str:
        how = self.composite if self.composite is not None else self.rule_mapper
        return f"LRP({how!r}, target={self.target!r})"

    @staticmethod
    def default_skip(name: str, module: nn.Module) -> bool:
        """What merely contains other modules: a ``skip_modules``."""
        containers = (nn.ModuleList, nn.ModuleDict, nn.Sequential, TensorDictModule)
        return name in ("", "td_module", "module") or isinstance(module, containers)

    def explain(self, runner: Runner, td: TensorDictBase) -> Mapping[NestedKey, Tensor]:
        """Run the model forwards under its rules, and pull the relevance of the target back to the sources."""
        plan, ledger = runner.state.ready(runner), self._new_ledger(runner.state)
        if self.references is not None:
            if self.is_one_pass:
                found = mean_difference(self, runner, td)
                if found is not None:
                    return found
            runner.state.draw()
        heads = runner.setup.heads
        known = heads.known
        with runner.forward(td, plan.rules_on(ledger)) as run:
            if self.references is not None:
                if heads.known and not known and heads.possible:
                    raise NowKnown  # on the reference they will be off the tape
                return explain_difference(runner, run, runner.state, plan, self.seeder, self.references)
            seeds, sources = run.seeds(self.seeder, plan.flow), run.sources()
            pulled = run.pull(seeds, sources, keep=ledger is not None)
            if ledger is not None:
                runner.beside.update(balance(ledger, run, seeds, sources, plan.flow))
            if self._copies:
                runner.beside.update(copies_of(run))
            return {key: plan.relevance(sources[key], found) for key, found in pulled.items()}

    @property
    def is_one_pass(self) -> bool:
        """Where there are several references, and nothing is told of each."""
        references = self.references
        return references is not None and references.samples > 1 and not (self.ledger or references.values)

    def coefficients(
        self, runner: Runner, td: TensorDictBase, there: Mapping[NestedKey, Tensor]
    ) -> Mapping[NestedKey, Tensor]:
        """Relevance per unit of activation; with a baseline per unit of the difference from ``there``, whatever it is.

        In the gradient flow that is what arrives. In the relevance flow it is the ratio, and zero where that has none.
        """
        plan = runner.state.ready(runner)
        if self.references is not None:
            return self.against(Elsewhere(there))._per_difference(runner, td, there)
        with runner.forward(td, plan.rules_on(None)) as run:
            sources = run.sources()
            pulled = run.pull(run.seeds(self.seeder, plan.flow), sources)
            if plan.flow == "gradient":
                return pulled
            return {key: per_value(sources[key], found) for key, found in pulled.items()}

    def _per_difference(
        self, runner: Runner, td: TensorDictBase, there: Mapping[NestedKey, Tensor]
    ) -> dict[NestedKey, Tensor]:
        relevance = self.explain(runner, td)
        run = runner.as_it_is()
        begun, nearest = self.begun(run), run.independent_sources()[0]
        for key in nearest:
            if key not in begun:
                raise ValueError(
                    f"what is compared differs at {key!r} by itself, since it depends on nothing that LRP attributes: "
                    "name what it depends on, LRP(..., input_modules=[...])"
                )
        here = run.sources(relevance)
        return {key: per_value(difference(here[key], there[key]), found) for key, found in relevance.items()}

    def accounted(self) -> LRP:
        """The same with a ledger; as it is where the rules yield a sensitivity, of which there are no accounts."""
        if self.composite is None or any(rule.yields == "sensitivity" for _, rule in self.composite):
            return self
        other = copy.copy(self)
        other.ledger = True
        return other

    def in_gradients(self) -> LRP:
        """The same in the gradient flow, if it has a composite, whose rules are converted to it."""
        other = copy.copy(self)
        other.flow = self.flow if self.composite is None else "gradient"
        return other

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
        model = Model.of(module, in_keys, out_keys)
        if td is not None and is_unmade(model.root):
            initialise(model, td)
        plan = self._plan(model, td)
        if td is not None and plan.interception is not None:
            setup = Setup(model, self.question)
            with Undoing():
                learn_order(plan, Runner(setup, td))
                rehearse(plan, Runner(setup, td))
        return plan

    def start(self, model: Model) -> Ready:
        """Find the rules."""
        known = {unravel_key(key) for key in (*model.runner.in_keys, *model.runner.out_keys)}
        if known & set(self.seeder.in_keys):
            raise ValueError("Additional init keys must not be in the in_keys or out_keys")
        needs_execution = self.composite is not None and self.composite.needs_execution
        return Ready(partial(self._plan, model), partial(self._complain, model), needs_execution)

    @property
    def writes(self) -> tuple[NestedKey, ...]:
        """The ledger, and what is explained as it is on the reference, as far as the target says what that is."""
        accounts = ("target", "inputs", "absorbed", "gap") if self.ledger else ()
        there = self.references is not None and self.references.values
        explained = self.seeder.explains or () if there else ()
        levels = [cast("tuple[str, ...]", under(REFERENCE, key)) for key in explained]
        return (*(("ledger", name) for name in accounts), *levels)

    @property
    def writes_under(self) -> tuple[str, ...]:
        """``"spread"`` and ``"reference"``, as far as they were asked for."""
        values = self.references is not None and self.references.values
        return (*((SPREAD,) if self.spreads else ()), *((REFERENCE,) if values else ()))

    def reads_signs(self, state: Ready) -> bool:
        """Rules that treat contributions by their sign skip terms."""
        return any(row.rule is not None and row.rule.needs_sign for row in state.plan.rows)

    def looks_across(self, state: Ready) -> bool:
        """Rules of a user's, and functions for stabilisers, may take a mean over all that they see."""
        rules = [row.rule for row in state.plan.rows if row.rule is not None]
        operations = () if self.composite is None else self.composite.on_operations
        return any(rule.looks_across for rule in (*rules, *(rule for _, rule in operations)))

    def learnt(self, state: Ready) -> str:
        """How far decisions are held on a reference."""
        reference = state.plan.reference
        return "" if reference is None else f"decided {reference.decided}"

    def report(self, state: Ready) -> Table:
        """The ledger of the last call as a table for ``rich.print``: one row per module or operation at each place.

        Raises:
            RuntimeError: no ledger was kept.
        """
        if state.ledger is None:
            raise RuntimeError(
                "there is no ledger to report: give LRP(..., ledger=True) and call the explained module"
            )
        return ledger_table(state.ledger)

    def _new_ledger(self, state: Ready) -> Ledger | None:
        if not self.ledger:
            return None
        if state.plan.interception is None or state.plan.sensitivity:
            raise ValueError(
                "ledger=True needs a composite whose result is relevance: rule mappers and modified gradients "
                "conserve none"
            )
        state.ledger = Ledger()
        return state.ledger

    def _plan(self, model: Model, td: TensorDictBase | None) -> Plan:
        return make_plan(
            observe(model, td),
            self.composite if self.composite is not None else self.rule_mapper,
            defaults=self.composite is not None,
            skip=self.skip_modules,
            flow=self.flow,
            merge_batch_norm=self.merge_batch_norm,
            unmatched=_Unmatched(self.on_unmatched),
            cache_weights=self.cache_weights,
            against=self.references is not None,
        )

    def _complain(self, model: Model, plan: Plan) -> None:
        for name, modules in inner_modules(model, self.question).items():
            plan.require_seen(modules, name)
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


class _Unmatched:
    """Reports an operation that nothing is known of, once for each place."""

    def __init__(self, how: str) -> None:
        self.how = how
        self.told: set[tuple[str, str]] = set()

    def __call__(self, operation: str, path: str) -> None:
        where = f"the operation `{operation}`" + (f" in module `{path}`" if path else "")
        found = f"nothing is known of {where}, which is treated as arithmetic under the epsilon rule"
        remedy = f'give it a rule, (Op("{operation}"), rule) in the composite'
        if self.how == "raise":
            raise NotImplementedError(f"{found}; {remedy}")
        # Only the first run tells paths.
        told = (operation, path) in self.told or (not path and operation in {name for name, _ in self.told})
        if self.how == "warn" and not told:
            self.told.add((operation, path))
            warnings.warn(f"{found}; {remedy}", stacklevel=2)


def _split(options: Options) -> tuple[Shared, Keywords03]:
    """Keywords of any method, and those of tdhook 0.3."""
    shared = {name: value for name, value in options.items() if name in Shared.__annotations__}
    older = {name: value for name, value in options.items() if name not in shared}
    return cast(Shared, shared), cast(Keywords03, older)


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
