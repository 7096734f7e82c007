"""Explaining a difference: what LRP finds where it is given a baseline."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook.passes.forward import Run
from tdhook.passes.runner import Runner
from tdhook.perturbing.references import Drawn, References
from tdhook.relevance.ledger.balance import balance
from tdhook.relevance.ledger.ledger import Ledger
from tdhook.relevance.plans.beside import Beside
from tdhook.relevance.plans.plan import Plan
from tdhook.relevance.propagation.reference import Parted
from tdhook.targets.base import Seeder, Seeds

__all__ = ["explain_difference"]


def explain_difference(
    runner: Runner, run: Run, plan: Plan, ledger: Ledger | None, seeder: Seeder, references: References
) -> dict[NestedKey, Tensor]:
    """Share the difference of the target from what it is on a reference, on the mean of several of these.

    Args:
        runner: runs the model.
        run: the run that is explained, under the rules of ``plan``.
        plan: a plan of differences.
        ledger: keeps accounts, if any.
        seeder: what is explained.
        references: what it is compared with.

    Returns:
        Relevance by source, as :meth:`~tdhook.contexts.attribution.Attribution.explain` does.
    """
    sources, seeds = run.sources(), run.seeds(seeder)
    target, asked = runner.pinned(run)
    ends = {key: x.detach() for key, x in sources.items()}
    found: dict[NestedKey, Tensor] = {}
    drawn = references.of(run.independent_sources()[0], run.batch_dims(sources), runner.td)
    for number, one in enumerate(drawn):
        other = _beside(runner, plan, ledger, target, asked, one)
        grads = _seeds(seeds, run, other, plan)
        if ledger is not None:
            runner.beside.update(
                balance(ledger, run, grads, sources, plan.flow, _counterparts(run, other, seeds, sources))
            )
        last = number == len(drawn) - 1
        pulled = run.pull(grads, sources, keep=ledger is not None or not last)
        starts = other.sources()
        for key, value in pulled.items():
            difference = ends[key] - starts[key].detach() if key in starts else torch.zeros_like(ends[key])
            share = plan.relevance(difference, value) / len(drawn)
            found[key] = found[key] + share if key in found else share
    return found


def _beside(
    runner: Runner, plan: Plan, ledger: Ledger | None, target: Seeder, asked: TensorDictBase, one: Drawn
) -> Run:
    reference = plan.reference
    assert reference is not None
    given = asked
    if one.entries:
        given = asked.copy()
        for key, value in one.entries.items():
            given.set(key, value)
    while True:
        within = Beside(plan, whole=ledger is not None)
        try:
            with runner.forward(given, within, target=target, replaced=one.replaced) as run:
                pass
        except Parted as error:
            if reference.decided == 2:
                raise
            reference.decided += 1
            _tell(error)
            continue
        if not reference.overwritten:
            return run


def _tell(error: Parted) -> None:
    warnings.warn(
        f"{str(error).split('. ')[0]}; on the reference it is run with the decisions that it takes on the input, and "
        "the difference from there is explained",
        stacklevel=2,
    )


def _counterparts(
    run: Run, other: Run, seeds: Seeds, sources: Mapping[NestedKey, Tensor]
) -> Callable[[Tensor], Tensor]:
    """What values of one run are in the other."""
    offered, starts = other.offered(), {**other.inputs, **other.sources()}
    found = {id(z): offered.get(key) for key, z in zip(seeds.keys, seeds.tensors, strict=True)}
    found.update((id(x), starts[key]) for key, x in {**run.inputs, **sources}.items() if key in starts)
    return lambda x: found.get(id(x), x).detach()


def _seeds(seeds: Seeds, run: Run, other: Run, plan: Plan) -> Seeds:
    """Where the backward pass starts: at differences of what is explained."""
    if plan.flow == "gradient":
        return seeds
    offered = other.offered()
    grads = []
    for key, z, grad in zip(seeds.keys, seeds.tensors, seeds.grads, strict=True):
        rise = z.detach() - offered.get(key).detach()
        grads.append(torch.where(grad == 0, 0.0, grad * rise))
    return Seeds(seeds.keys, seeds.tensors, grads, seeds.several)
