"""Make, print and write an explained rollout: what `tdhook demo` and `tdhook explain` do."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.text import Text
from tensordict import TensorDict
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor

import tdhook
from tdhook.attribution.lrp import LRP
from tdhook.cli.folders import picture_names, replaced_output, require_output
from tdhook.cli.policies import Stage, default_target
from tdhook.cli.tables import conservation_table, progress_bar, relevance_table
from tdhook.composites import Composite
from tdhook.configuration import write_key, write_target
from tdhook.contexts.attribution import Attribution
from tdhook.contexts.compared import Compared, Complete, compared
from tdhook.markup import visible
from tdhook.perturbing.references import References
from tdhook.plots import relevance_on_frames, relevance_over_time
from tdhook.rl import Policy
from tdhook.rl.explain import Explain
from tdhook.rl.rollouts import (
    Conservation,
    Episode,
    Summary,
    conservation,
    explained_rollout,
    save,
    summarise,
    taken_actions,
)
from tdhook.rl.screens import put_on_screen
from tdhook.targets import Target

__all__ = ["Request", "run"]

_FRAMES = 8
"""How many frames are drawn in one picture."""


@dataclass(frozen=True)
class Request:
    """What to explain, and how.

    Attributes:
        policy: who acts, and where.
        composite: the rules.
        composite_name: what the user calls them.
        target: what is explained; ``None`` for the value or logit of the action taken.
        steps: how many steps.
        seed: of the environment and of sampled actions.
        attribute: keys besides the inputs that are explained.
        frames: whether the environment is rendered at each step.
        baseline: what the target is compared with, and what the user calls it; ``None`` to explain its value.
        method: another method than LRP under the composite, whose name is then that of the method.
    """

    policy: Policy
    composite: Composite
    composite_name: str
    target: Target | None
    steps: int
    seed: int
    attribute: tuple[NestedKey, ...] = ()
    frames: bool = False
    baseline: tuple[References, str] | None = None
    method: Attribution | None = None

    @property
    def rules(self) -> Composite:
        """What is explained by; no rules where the method has none."""
        if self.method is None:
            return self.composite
        given = self.method.composite if isinstance(self.method, LRP) else None
        return Composite([]) if given is None else given

    @property
    def how(self) -> str:
        """The rules and the baseline, as the user calls them."""
        return (
            self.composite_name
            if self.baseline is None
            else f"{self.composite_name} against {self.baseline[1]}"
        )


@dataclass(frozen=True)
class _View:
    """One picture: the relevance of one key for one output.

    Attributes:
        label: what tells it from the others.
        relevance: ``[steps, features]``.
        value: of the key, ``[steps, features]``.
        summary: of the rollout as seen here.
    """

    label: str
    relevance: Tensor
    value: Tensor
    summary: Summary


def run(request: Request, out: Path) -> None:
    """Explain, print, and write ``rollout``, ``relevance.png`` and ``summary.json`` below ``out``, all or nothing."""
    policy, console = request.policy, Console()
    require_output(out)  # before any work, and again when it is done
    torch.manual_seed(request.seed)
    stage = Stage.of(policy, request.seed, request.frames)
    target = request.target or default_target(policy)
    keys = [unravel_key(key) for key in (*policy.actor.in_keys, *request.attribute)]
    method = _afterwards(request, target, keys)
    against = isinstance(method, Compared) and method.references is not None
    acting = policy.actor
    if method is None:
        acting = LRP(request.composite, target=target, attribute=keys).wrap(acting)
    with closing(stage.env) as env, progress_bar() as progress:
        task = progress.add_task(
            escape(visible(f"{policy.env_id}: acting and explaining")), total=request.steps
        )
        rollout = explained_rollout(
            env,
            acting,
            request.steps,
            lambda done: progress.update(task, completed=done),
            frames=request.frames,
        )
        if method is not None:
            progress.update(task, description="explaining what was done")
            rollout = Explain(method, policy.actor, mask_key=None)(rollout)
            account = Conservation.of(rollout["ledger"]) if "ledger" in rollout else None
        else:
            progress.update(task, description="checking that relevance is conserved")
            account = conservation(rollout, policy.actor, request.composite, target)
        put_on_screen(env, rollout)
    views = _views(rollout, keys, policy, stage.actions)
    what = f"{policy.env_id}: relevance for {write_target(target)} under {request.how}"
    _show(console, what, views, account, against, _unaccounted(request))
    for path in _write(out, request, target, rollout, views, account, what):
        console.print(Text(visible(f"wrote {path}")), soft_wrap=True)


def _afterwards(request: Request, target: Target, keys: list[NestedKey]) -> Attribution | None:
    """What explains a rollout when all that it may be compared with is there; ``None`` where each step is as it acts.

    Raises:
        ValueError: there is a baseline, and the method compares with none.
    """
    method, baseline = request.method, request.baseline
    if method is None:
        if baseline is None:
            return None
        method = LRP(request.composite)
    method = compared(method, None if baseline is None else baseline[0])
    if isinstance(method, Complete | LRP):
        method = method.accounted()
    return method.asked(target=target, attribute=keys)


def _views(
    rollout: TensorDict, keys: list[NestedKey], policy: Policy, action_names: tuple[str, ...]
) -> list[_View]:
    views = []
    for key in keys:
        where = ("attr", key) if isinstance(key, str) else ("attr", *key)
        relevance = rollout.get(where, None)
        if relevance is None:  # an input without gradient, of which a note tells
            continue
        value = rollout[key]
        if value.dim() == 4 and len(policy.features) == value.shape[1]:  # one name per channel of an image
            relevance, value = relevance.sum((-2, -1)), value.mean((-2, -1))
        value = value.flatten(1)
        count = value.shape[1]
        named = key == policy.actor.in_keys[0] and len(policy.features) == count
        features = policy.features if named else tuple(f"x{i}" for i in range(count))
        each = relevance.reshape(len(rollout), -1, count).unbind(1)
        for i, part in enumerate(each):
            labels = [write_key(key)] if len(keys) > 1 else []
            if len(each) > 1:
                labels.append(action_names[i] if len(each) == len(action_names) else f"output {i}")
            summary = summarise(rollout.copy().set(where, part), features, action_names, where)
            views.append(_View(", ".join(labels), part, value, summary))
    return views


def _show(
    console: Console, what: str, views: list[_View], account: Conservation | None, against: bool, subject: str
) -> None:
    console.print(Text(visible(what), style="bold"))
    _show_episodes(console, views[0].summary.episodes)
    for view in views:
        console.print(
            relevance_table(view.summary, ", ".join(filter(None, ("Mean relevance per step", view.label))))
        )
    if account is None:
        console.print(f"{subject}, which is not conserved: it does not sum to the target.")
    else:
        console.print(conservation_table(account, against))


def _unaccounted(request: Request) -> str:
    """What there is no account of, the beginning of a sentence."""
    if request.method is None:
        return "These rules give a modified gradient"
    return f"The method {request.composite_name} gives a measure"


def _show_episodes(console: Console, episodes: tuple[Episode, ...], most: int = 6) -> None:
    for episode in episodes if len(episodes) <= most else ():
        end = "" if episode.finished else " so far (cut off by --steps)"
        console.print(f"episode return {episode.total:g} in {episode.steps} steps{end}", highlight=False)
    if len(episodes) > most:
        totals = [episode.total for episode in episodes if episode.finished]
        console.print(
            f"episode return {sum(totals) / len(totals):g} on average over {len(totals)} episodes "
            f"({min(totals):g} to {max(totals):g})",
            highlight=False,
        )


def _write(
    out: Path,
    request: Request,
    target: Target,
    rollout: TensorDict,
    views: list[_View],
    account: Conservation | None,
    what: str,
) -> list[Path]:
    """Write all that there is, whole; what an earlier run wrote, or was made of it, goes."""
    told: dict[str, object] = {
        "tdhook": tdhook.__version__,
        "environment": request.policy.env_id,
        "seed": request.seed,
        "target": write_target(target),
        "composite": {"name": request.composite_name, **request.rules.to_dict()},
        "method": request.composite_name if not len(request.rules) else None,
        "baseline": None if request.baseline is None else request.baseline[1],
        "conservation": None if account is None else asdict(account),
        "explanations": [{"of": view.label or "observation", **view.summary.to_dict()} for view in views],
    }
    unfinished = {"target": told["target"], "composite": request.how, "steps": len(rollout)}
    with replaced_output(out, unfinished) as new:
        names = ["rollout", *_draw(new, rollout, views, what), "summary.json"]
        save(rollout, new / "rollout")
        text = json.dumps(told, indent=2, allow_nan=False) + "\n"
        (new / "summary.json").write_text(text, encoding="utf-8")
    return [out / name for name in names]


def _draw(folder: Path, rollout: TensorDict, views: list[_View], what: str) -> list[str]:
    """Draw the pictures, and give their names."""
    names = picture_names([view.label for view in views])
    starts = list(accumulate(episode.steps for episode in views[0].summary.episodes))[:-1]
    for name, view in zip(names, views, strict=True):
        summary = view.summary
        figure = relevance_over_time(
            view.relevance,
            summary.features,
            actions=taken_actions(rollout, len(summary.actions)),
            action_names=summary.actions,
            observation=view.value,
            title=", ".join(filter(None, (what, view.label))),
            episode_starts=starts,
        )
        figure.savefig(folder / name, dpi=130)
    maps = rollout.get(("attr", "frame"), None)
    if maps is not None and maps.dim() == rollout.batch_dims + 2:
        shown = torch.linspace(0, len(rollout) - 1, min(_FRAMES, len(rollout))).long()
        titles = [f"step {i}" for i in shown.tolist()]
        figure = relevance_on_frames(rollout["frame"][shown], maps[shown], titles, title=what)
        figure.savefig(folder / "frames.png", dpi=130)
        names.append("frames.png")
    return names
