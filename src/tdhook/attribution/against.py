"""Explaining a difference: what LRP finds where it is given a baseline."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook.attribution.explanations import SEVERAL, side_by_side
from tdhook.attribution.kept import Kept, There
from tdhook.attribution.means import Means
from tdhook.contexts.compared import SPREAD, Compared, write_under
from tdhook.conventions import relevance_of
from tdhook.keys import under
from tdhook.models.families import BatchNorm
from tdhook.passes.diagnosis import is_explainable, why_not_finite
from tdhook.passes.finite import are_finite
from tdhook.passes.forward import Run
from tdhook.passes.runner import Runner
from tdhook.perturbing.drawn import Drawn
from tdhook.perturbing.references import References
from tdhook.relevance.ledger.balance import balance
from tdhook.relevance.ledger.ledger import Entry
from tdhook.relevance.plans.beside import Beside
from tdhook.relevance.plans.plan import Plan
from tdhook.relevance.plans.rehearsal import Ready
from tdhook.relevance.propagation.reference import Parted
from tdhook.relevance.propagation.unfollowed import mark_infinite
from tdhook.relevance.secants.pair import difference
from tdhook.tape.conditions import is_traced
from tdhook.tape.internals import is_wrapped
from tdhook.targets.base import Seeder, Seeds
from tdhook.targets.through import begun_at, tells_units

__all__ = ["REFERENCE", "explain_difference", "mean_difference"]

REFERENCE = "reference"
"""Where what is explained is written as it is on the reference."""


def explain_difference(
    runner: Runner, run: Run, ready: Ready, plan: Plan, seeder: Seeder, references: References
) -> dict[NestedKey, Tensor]:
    """Share the difference of the target from what it is on a reference, on the mean of several of these.

    Args:
        runner: runs the model.
        run: the run that is explained, under the rules of ``plan``.
        ready: what is kept from call to call.
        plan: a plan of differences.
        seeder: what is explained.
        references: what it is compared with.

    Returns:
        Relevance by source, as :meth:`~tdhook.contexts.attribution.Attribution.explain` does.
    """
    ledger = ready.ledger
    sources = run.sources()
    ends = {key: x.detach() for key, x in sources.items()}
    found, values, sums = Means(references.spread), Means(), Means()
    accounts: list[list[Entry]] = []
    per_element = True
    drawn = references.of(run.independent_sources()[0], run.batch_dims(sources), runner.td)
    if len(drawn) > 1 and tells_units(seeder):
        raise ValueError(
            "the units that matter most are not the same against each of several references: name the units, or "
            "compare with one reference"
        )
    beside = _Runs(runner, run, ready, plan, references)
    for one in drawn:
        there = beside.on(one)
        seeds = run.seeds(seeder, plan.flow, _Rises(there, plan))
        if not there.finite and not is_traced():
            _require_finite_baseline(one, {**run.inputs, **sources})
        _require_finite(runner, one, there, seeds.whole or seeds)
        if references.values:
            explained = seeds.whole or seeds
            values.add(
                {
                    key: there.outputs(key).expand_as(z)
                    for key, z in zip(explained.keys, explained.tensors, strict=True)
                }
            )
        # Without `keep`: what is infinite in both runs, as a mask, is no difference to the accounts as it is.
        pulled = run.pull(seeds, sources)
        if ledger is not None:
            counterparts = _counterparts(run, there, seeds, sources)
            sums.add(balance(ledger, run, seeds, sources, plan.flow, counterparts))
            accounts.append(ledger.accounts())
            per_element = per_element and ledger.per_element
        shares = {}
        for key, value in pulled.items():
            start = there.sources.get(key, ends[key])
            shares[key] = plan.relevance(difference(ends[key], start.detach()), value)
        found.add(shares)
    if ledger is not None:
        ledger.close_on(accounts)
        ledger.per_element = per_element
    runner.beside.update(sums.mean)
    runner.beside.update({under(REFERENCE, key): value for key, value in values.mean.items()})
    write_under(SPREAD, runner, run, found.deviations())
    return found.mean


def mean_difference(
    method: Compared, runner: Runner, td: TensorDictBase
) -> Mapping[NestedKey, Tensor] | None:
    """The mean of what a method says of the difference from each reference, as many at once as fit.

    Args:
        method: takes one pass for each reference.
        runner: runs the model.
        td: the batch.

    Returns:
        Relevance by source; ``None`` where references go one after the other.
    """
    if method.samples < SEVERAL or tells_units(method.seeder):
        return None
    means = Means(method.spreads)
    with runner.forward(td) as run:
        many = side_by_side(method, runner, run)
        if many is None:
            return None
        for some in many:
            means.add_all(some, len(next(iter(some.values()))))
        write_under(SPREAD, runner, run, means.deviations())
    return means.mean


def _require_finite_baseline(one: Drawn, values: Mapping[NestedKey, Tensor]) -> None:
    """See that values are compared with numbers; what masks may be infinite in both.

    Raises:
        ValueError: a baseline has others.
    """
    for key, other in one.replaced.items():
        x = values.get(key)
        if x is not None and not are_finite([other]):
            odd = int((~other.isfinite() & (other != x)).sum())
            if odd:
                raise ValueError(
                    f"the baseline of {key!r} has {odd} NaN or infinite values among its {x.numel()}"
                )


def _require_finite(runner: Runner, one: Drawn, there: There, seeds: Seeds) -> None:
    """See that what is explained is finite on the reference: a difference from anything else is none.

    Raises:
        ValueError: it is not; the message names what makes it so.
    """
    for key, z, grad in zip(seeds.keys, seeds.tensors, seeds.grads, strict=True):
        if key in there.finite:
            continue
        other = there.outputs(key)
        if not is_traced() and are_finite([other]):
            there.finite.add(key)
        elif not is_explainable(other.expand_as(z), grad):
            td = runner.td.copy()
            for name, value in (*one.replaced.items(), *one.entries.items()):
                if name in td.keys(True) and value.dtype == td.get(name).dtype:
                    td.set(name, value)
            why = why_not_finite(runner.setup.model, runner.setup.in_keys, key, td)
            raise ValueError(f"on the baseline, with which the values are compared, {why}")


class _Runs:
    """Runs a model on references, beside a run that is explained.

    Args:
        runner: runs the model.
        run: the run that is explained.
        ready: what is kept from call to call.
        plan: the rules.
        references: what is compared with.
    """

    def __init__(self, runner: Runner, run: Run, ready: Ready, plan: Plan, references: References) -> None:
        assert plan.reference is not None
        self.runner, self.run, self.ready, self.plan = runner, run, ready, plan
        self.reference = plan.reference
        target = runner.setup.question.target
        # Whatever the target computes depends on more than the reference: on an action that was taken, say.
        self._settled = references.constant and not target.writes and ready.ledger is None
        trains = any(isinstance(m, BatchNorm.members) and m.training for m in plan.modules)
        self._settled = self._settled and not trains and not torch.compiler.is_compiling()
        # What it draws it will draw anew.
        self._settled = self._settled and not ready.drawn()
        # What was met inside torch.vmap cannot be read outside it.
        met = (x for place in self.reference.places for x in place.given)
        self._settled = self._settled and not any(map(is_wrapped, met))

    def on(self, one: Drawn) -> There:
        """The run on a reference, or a kept one that did the same."""
        given = self._given(one)
        if not self._settled or given is None:
            return self._there(self._forward(one))
        alone = self.ready.one_row is not False and self._is_uniform(one)
        first = {key: value[:1] for key, value in given.items()} if alone else given
        kept = self.ready.kept
        if isinstance(kept, Kept) and kept.fits(first, self.reference, self.plan.modules):
            return kept.there
        if not alone:
            made = self._there(self._forward(one))
        elif self.ready.one_row is None:
            made = self._there(self._forward(one))
            self.ready.one_row = self._is_alike(one)
            first = first if self.ready.one_row else given
        else:
            try:
                made = self._there(self._forward(one, alone=True))
            except Parted:  # what one row decides is not what each row of the batch does
                made, first = self._there(self._forward(one)), given
        if not self.reference.decided:
            self.ready.kept = Kept.of(made, first, self.reference, self.plan.modules)
        return made

    def _given(self, one: Drawn) -> dict[NestedKey, Tensor] | None:
        """What the run depends on, by key; ``None`` where that cannot be told."""
        found = dict(one.replaced)
        for key in self.runner.setup.in_keys:
            if key not in found:
                value = self.runner.replaced.get(key, self.runner.td.get(key, None))
                if not isinstance(value, Tensor):
                    return None
                found[key] = value.detach()
        return found

    def _is_uniform(self, one: Drawn) -> bool:
        """Whether all rows of the reference are the same, and nothing else goes into the model."""
        td = self.runner.td
        if td.batch_dims != 1 or len(td) < 2 or one.entries:
            return False
        if not set(self.runner.setup.in_keys) <= set(one.replaced):
            return False
        return all(_is_one_row(value) for value in one.replaced.values())

    def _is_alike(self, one: Drawn) -> bool:
        """Whether a run on one row does to it what one on all of the batch did to each."""
        reference = self.reference
        met, decided = list(map(copy, reference.places)), reference.decided
        try:
            self._forward(one, alone=True)
        except Exception:  # the model's own, which one row need not suit
            alike = False
        else:
            alike = all(
                _are_close([*whole.starts, *whole.before], [*place.starts, *place.before])
                for whole, place in zip(met, reference.places, strict=True)
            )
        for place, whole in zip(reference.places, met, strict=True):
            place.fill_as(whole)
        reference.decided = decided
        return alike

    def _forward(self, one: Drawn, *, alone: bool = False) -> Run:
        runner, reference = self.runner, self.reference
        target, given = runner.pinned(self.run, begun_at(runner.setup.question.target))
        if one.entries:
            given = given.copy()
            for key, value in one.entries.items():
                given.set(key, value)
        replaced = one.laid_out_as(self.run.independent_sources()[0])
        if alone:
            given, replaced = given[:1], {key: value[:1] for key, value in replaced.items()}
        reference.one, reference.keys = alone, tuple(one.replaced)
        if not is_traced():
            reference.decided = 0  # a graph takes what was found out before
        while True:
            within = Beside(self.plan)
            try:
                with runner.forward(given, within, target=target, replaced=replaced) as run:
                    pass
            except Parted as error:
                if alone or reference.decided == 2:
                    raise
                reference.decided += 1
                _tell(error, reference.told)
                continue
            if not reference.overwritten:
                if self.ready.ledger is None and not is_traced():  # else the account tells what is lost
                    mark_infinite(reference)
                return run

    @staticmethod
    def _there(run: Run) -> There:
        sources = {key: x.detach() for key, x in run.sources().items()}
        inputs = {key: x.detach() for key, x in run.inputs.items()}
        offered = run.offered().detach()
        passed = {key: x.detach() for key, x in run.passed().items()}
        return There(lambda key: passed[key] if key in passed else offered.get(key), sources, inputs)


def _is_one_row(value: Tensor) -> bool:
    """Whether all rows of a tensor are the same."""
    return value.stride(0) == 0 or torch.equal(value, value[:1].expand_as(value))


def _are_close(full: Sequence[Tensor | None], one: Sequence[Tensor | None]) -> bool:
    if len(full) != len(one):
        return False
    return all(
        a is b or (a is not None and b is not None and _is_close(a, b))
        for a, b in zip(full, one, strict=True)
    )


def _is_close(a: Tensor, b: Tensor) -> bool:
    if not a.is_floating_point():
        return bool((a == b).all())
    tolerance = 64 * torch.finfo(a.dtype).eps
    return bool(torch.allclose(a, b.expand_as(a), tolerance, tolerance, equal_nan=True))


def _tell(error: Parted, told: set[str]) -> None:
    if str(error) in told:
        return
    told.add(str(error))
    warnings.warn(
        f"{str(error).split('. ')[0]}; on the reference it is run with the decisions that it takes on the input, and "
        "the difference from there is explained",
        stacklevel=2,
    )


def _counterparts(
    run: Run, there: There, seeds: Seeds, sources: Mapping[NestedKey, Tensor]
) -> Callable[[Tensor], Tensor]:
    """What values of one run are in the other."""
    starts = {**there.inputs, **there.sources}
    found: dict[int, Tensor] = {}
    for explained in (seeds, seeds.whole):
        if explained is not None:
            pairs = zip(explained.keys, explained.tensors, strict=True)
            found.update((id(z), there.outputs(key)) for key, z in pairs)
    found.update((id(x), starts[key]) for key, x in {**run.inputs, **sources}.items() if key in starts)
    return lambda x: found.get(id(x), x).detach()


@dataclass(frozen=True)
class _Rises:
    """What is explained, as it differs from a reference: :class:`~tdhook.passes.within.Against`."""

    there: There
    plan: Plan

    def rises(self, seeds: Seeds) -> Seeds:
        """Where the backward pass starts: at differences of what is explained."""
        if self.plan.flow == "gradient":
            return seeds
        grads = [
            relevance_of(self.rise(key, z), grad, "gradient")
            for key, z, grad in zip(seeds.keys, seeds.tensors, seeds.grads, strict=True)
        ]
        return replace(seeds, grads=grads)

    def rise(self, key: NestedKey, value: Tensor) -> Tensor:
        """How far a value is from what it is on the reference."""
        return difference(value.detach(), self.there.outputs(key))

    def beside(self, value: Tensor) -> tuple[Sequence[Tensor], int]:
        """Where the function behind a value hands over to the layer that made it, if it does.

        And which axis there is the first one of the value.
        """
        assert self.plan.reference is not None
        return self.plan.reference.handles.beside(value)
