"""What units of a layer respond to, as a page: what `tdhook concepts` does."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.markup import escape
from rich.text import Text
from tensordict import TensorDict, TensorDictBase

from tdhook.attribution.lrp import LRP
from tdhook.cli.policies import Stage, default_target, find_policy, imported
from tdhook.cli.reducing import action_of
from tdhook.cli.tables import progress_bar
from tdhook.concepts import AttributionGraph, ReferenceSamples, attribution_graph
from tdhook.concepts.reading import Reading, explaining, is_path
from tdhook.configuration import (
    baseline_in,
    read_baseline,
    read_composite,
    read_key,
    read_target,
    write_target,
)
from tdhook.contexts.attribution import Attribution
from tdhook.datasets.rows import Rows, as_rows
from tdhook.datasets.sources import opened
from tdhook.markup import visible
from tdhook.pages.concepts import UnitShown, write_concepts_report
from tdhook.pages.names import group_name
from tdhook.rl import Policy
from tdhook.rl.rollouts import explained_rollout
from tdhook.targets import Units
from tdhook.targets.hindsight import InHindsight

__all__ = ["Asked", "run"]

_ALL = "_all"
_SHARE = 0.4
"""Of the relevance of a layer that the units have which a graph shows."""
_LISTED = 16
"""How many times as many steps are listed as are shown, from which those are taken that are apart."""


@dataclass(frozen=True)
class Asked:
    """What to look for, and where.

    Attributes:
        policy: a checkpoint or an import path.
        layer: the path of a module, or a key.
        env: where the policy acts, if not where it says.
        source: a folder with data, instead of acting.
        prepare: what makes rows of the source what the policy reads.
        steps: how many are acted.
        seed: of acting.
        composite: the rules.
        baseline: what is compared with, if not what a composite file says.
        target: what is explained.
        axis: that of the units.
        heads: how many equal parts it has.
        by: what steps are chosen by.
        units: how many are shown of each action.
        top: how many steps are shown of each.
        apart: how many rows are between any two of these.
        graph: layers, in the order of the model, between whose units a graph is drawn; none if there is to be none.
    """

    policy: str
    layer: str
    env: str | None
    source: Path | None
    prepare: str | None
    steps: int
    seed: int
    composite: str
    baseline: str | None
    target: str | None
    axis: int
    heads: int | None
    by: str
    units: int
    top: int
    apart: int
    graph: tuple[str, ...]


def run(asked: Asked, out: Path) -> None:
    """Act, or read data, find the units that matter most for each action, and write the page."""
    if out.is_dir():
        raise IsADirectoryError(f"{out} is a folder, where the page is to be a file: give --out FILE")
    by = _by(asked.by)
    policy = find_policy(asked.policy, asked.env, need_env=asked.source is None)
    target = default_target(policy) if asked.target is None else read_target(asked.target)
    named = baseline_in(asked.composite) if asked.baseline is None else asked.baseline
    against = None if named in (None, "none") else read_baseline(named)
    method = LRP(read_composite(asked.composite), target=target, baseline=against)
    prepare = None if asked.prepare is None else imported(asked.prepare, "--prepare takes a function of rows")
    if asked.graph and method.steps_before:
        raise ValueError("a graph is of single steps, and --baseline previous of two: leave out one of them")
    reading: Reading = {"prepare": prepare, "in_order": asked.source is None and method.steps_before > 0}
    layer = asked.layer if is_path(policy.actor, asked.layer) else read_key(asked.layer)
    rows, actions = _rows(policy, asked)
    groups = action_of(rows.read(0, 1))
    samples = ReferenceSamples(
        method,
        layer,
        axis=asked.axis,
        heads=asked.heads,
        top=_LISTED * asked.top,
        by=by,
        groups=groups,
    )
    samples.fold(policy.actor, rows, **reading)
    found = samples.found
    shown = {
        group: [
            UnitShown(
                unit,
                samples.frames(
                    policy.actor, rows, unit, group=group, count=asked.top, apart=asked.apart, **reading
                ),
            )
            for unit in found.ranked(group)[: asked.units].tolist()
            if found.mean(group)[unit] > 0
        ]
        for group in found.groups
    }
    what = f"{policy.env_id or asked.policy}: {asked.layer}, {asked.by} for {write_target(target)}"
    facts = {
        "policy": asked.policy,
        "layer": asked.layer,
        "units": "heads" if asked.heads else f"axis {asked.axis}",
        "explained": write_target(target),
        "composite": asked.composite,
        **({} if against is None else {"baseline": named}),
        "source": str(asked.source)
        if asked.source is not None
        else f"{len(rows)} steps of acting, seed {asked.seed}",
    }
    names = {group: group_name(groups, group, actions) for group in found.groups}
    compared = explaining(method, policy.actor, rows, reading).method  # with the same means for all graphs
    graphs = {
        group: _graph(asked, compared, policy, several)
        for group, several in shown.items()
        if asked.graph and several
    }
    write_concepts_report(
        found,
        shown,
        out,
        by=asked.by,
        graphs=graphs,
        groups=names,
        features=policy.features,
        title=what,
        facts=facts,
    )
    told = f"wrote {out} ({out.stat().st_size / 1e6:.1f} MB)"
    Console().print(Text(visible(told)), soft_wrap=True)


def _graph(asked: Asked, method: Attribution, policy: Policy, shown: Sequence[UnitShown]) -> AttributionGraph:
    """What the units of some layers hand on to each other, on average over the steps that are shown."""
    steps = TensorDict.cat([one.frames.get("data") for one in shown])
    layers = {path: Units(asked.axis, asked.heads if path == asked.layer else None) for path in asked.graph}
    keys = [key for key in policy.actor.in_keys if steps.get(key).dim() == 2]
    done = method.explaining(InHindsight(method.seeder, _ALL))
    inputs = {key: Units(1) for key in keys}
    return attribution_graph(done, policy.actor, steps, layers, inputs=inputs).mean().pruned(_SHARE)


def _by(text: str) -> Literal["relevance", "value"]:
    if text == "relevance":
        return "relevance"
    if text == "value":
        return "value"
    raise ValueError(f"--by {text} is neither relevance nor value")


def _rows(policy: Policy, asked: Asked) -> tuple[Rows, tuple[str, ...]]:
    """What the policy saw and did, and the names of actions."""
    if asked.source is not None:
        return opened(asked.source), tuple(policy.actions)
    torch.manual_seed(asked.seed)
    stage = Stage.of(policy, asked.seed)
    with closing(stage.env) as env, progress_bar() as progress:
        task = progress.add_task(escape(visible(f"{policy.env_id}: acting")), total=asked.steps)
        rollout: TensorDictBase = explained_rollout(
            env, policy.actor, asked.steps, lambda done: progress.update(task, completed=done)
        )
    return as_rows(rollout.reshape(-1)), stage.actions
