"""Explained rollouts: make them, sum them up, account for their relevance, keep them on disk.

A policy that an attribution context has wrapped is still a policy, so an explained rollout is an ordinary one that
also has an entry ``("attr", key)`` for each input.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import Tensor, nn

from tdhook.attribution.lrp import LRP
from tdhook.composites import Composite
from tdhook.passes.rows import joined
from tdhook.rl.policies import require_names
from tdhook.rl.saved import load, require_replaceable, save
from tdhook.targets import Contrast, Target

if TYPE_CHECKING:
    from torchrl.envs import EnvBase

__all__ = [
    "Conservation",
    "Episode",
    "Summary",
    "conservation",
    "explained_rollout",
    "load",
    "require_replaceable",
    "save",
    "summarise",
]

_AT_ONCE = 256
"""How many steps are explained in one pass, so that memory does not grow with the rollout."""
_LARGEST = 400
"""Height and width that rendered frames have at most: a rollout has many of them."""


def explained_rollout(
    env: EnvBase,
    explained_policy: TensorDictModuleBase,
    steps: int,
    progress: Callable[[int], object] | None = None,
    frames: bool = False,
) -> TensorDict:
    """Let a policy act for ``steps`` steps, through as many episodes as they take.

    Args:
        env: a torchrl environment.
        explained_policy: what ``LRP(...).wrap(actor)`` gives.
        steps: how many steps.
        progress: called with the number of steps done, after each of them.
        frames: whether the environment is rendered at each step, as the policy sees it before it acts. It must have
            been made for that, as by :func:`tdhook.rl.make_env` with ``render=True``.

    Returns:
        A TensorDict of batch size ``[*env.batch_size, steps]`` with what the environment gave, what the policy wrote
        and the relevance of its inputs; and with ``frames``, the entry ``"frame"``, uint8
        ``[*env.batch_size, steps, height, width, 3]``. Large frames are made smaller, to 400 pixels at the most.

    Raises:
        ValueError: ``steps`` is not positive, or the environment gives no frames.
    """
    if steps < 1:
        raise ValueError(f"a rollout has at least one step, got steps={steps}")
    done = 0

    def step_done(*_: object) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done)

    with torch.no_grad():
        policy = _Rendered(env, explained_policy) if frames else explained_policy
        rollout: TensorDict = env.rollout(
            steps, policy, callback=step_done, break_when_any_done=False, return_contiguous=True
        )
    step_done()  # torchrl does not call back after the last step
    return rollout


class _Rendered(TensorDictModuleBase):
    """A policy beside which the environment is rendered, in the state in which it acts."""

    def __init__(self, env: EnvBase, policy: TensorDictModuleBase) -> None:
        super().__init__()
        self._env, self._policy = env, policy
        self.in_keys, self.out_keys = [*policy.in_keys], [*policy.out_keys, "frame"]

    def forward(self, td: TensorDictBase) -> TensorDictBase:
        acted: TensorDictBase = self._policy(td)
        return acted.set("frame", _frame(self._env))


def _frame(env: EnvBase) -> Tensor:
    """What an environment looks like now, ``[*batch, height, width, 3]``."""
    name = type(env).__name__
    modes = getattr(env, "render_mode", "unknown")  # of several environments, a list
    if modes is None or (isinstance(modes, list) and None in modes):
        raise ValueError(
            f"the {name} was not made to be rendered: make it with tdhook.rl.make_env(..., render=True), or give "
            'gymnasium\'s render_mode="rgb_array"'
        )
    try:
        rendered = env.render()
    except Exception as error:  # a package is missing, say; environments fail as they please
        raise ValueError(f"the {name} cannot be rendered: {type(error).__name__}: {error}") from error
    shots = rendered if isinstance(rendered, list) else [rendered]  # several environments give a list
    if not all(getattr(shot, "ndim", 0) == 3 and shot.shape[-1] == 3 for shot in shots):
        raise ValueError(
            f'the {name} renders no pictures [height, width, 3]: make it with gymnasium\'s render_mode="rgb_array"'
        )
    pictures = torch.stack([torch.as_tensor(shot.copy()) for shot in shots])
    smaller = -(-max(pictures.shape[1:3]) // _LARGEST)
    if smaller > 1:
        channels_first = pictures.movedim(-1, 1).to(torch.float32)
        pictures = nn.functional.avg_pool2d(channels_first, smaller).round().to(torch.uint8).movedim(1, -1)
    return pictures.reshape(*env.batch_size, *pictures.shape[1:])


@dataclass(frozen=True)
class Episode:
    """One episode of a rollout.

    Attributes:
        total: its return, the undiscounted sum of rewards.
        steps: its length.
        finished: whether it ended; the last one of a rollout may have been cut off.
    """

    total: float
    steps: int
    finished: bool


@dataclass(frozen=True, eq=False)
class Summary:
    """What a rollout comes to.

    Attributes:
        steps: number of steps, over all environments.
        episodes: the episodes, one environment after the other.
        features: names of the features.
        actions: names of the actions; empty where actions are not one of several.
        counts: how often each action was taken.
        by_action: ``[actions, features]``, mean relevance over the steps with that action; NaN where there is none.
        mean: ``[features]``, mean relevance over all steps.
        magnitude: ``[features]``, mean of the absolute relevance over all steps.
    """

    steps: int
    episodes: tuple[Episode, ...]
    features: tuple[str, ...]
    actions: tuple[str, ...]
    counts: tuple[int, ...]
    by_action: Tensor
    mean: Tensor
    magnitude: Tensor

    def to_dict(self) -> dict[str, object]:
        """This summary as plain data; an action that was never taken has no mean relevance.

        Raises:
            ValueError: two features, or two actions, have one name.
        """
        require_names(self.features, "features")
        require_names(self.actions, "actions")
        named = {
            action: dict(zip(self.features, row.tolist(), strict=True))
            for action, row, count in zip(self.actions, self.by_action, self.counts, strict=True)
            if count
        }
        return {
            "steps": self.steps,
            "episodes": [
                {"return": e.total, "steps": e.steps, "finished": e.finished} for e in self.episodes
            ],
            "action_counts": dict(zip(self.actions, self.counts, strict=True)),
            "mean_relevance": dict(zip(self.features, self.mean.tolist(), strict=True)),
            "mean_absolute_relevance": dict(zip(self.features, self.magnitude.tolist(), strict=True)),
            "mean_relevance_by_action": named,
        }


def summarise(
    rollout: TensorDictBase,
    features: Sequence[str],
    actions: Sequence[str],
    key: NestedKey = ("attr", "observation"),
) -> Summary:
    """Sum up an explained rollout.

    Args:
        rollout: of batch size ``[*batch, time]``.
        features: one name per entry of the explained input, flattened.
        actions: one name per action; none where the action is not one of several.
        key: where the relevance is, ``[*batch, time, *features]``.

    Raises:
        KeyError: the rollout has no such relevance.
        ValueError: it has no steps, or the names are not as many as there are features.
    """
    count = rollout.batch_size.numel()  # numel() of a TensorDict is never zero
    if rollout.batch_dims == 0 or count == 0:
        raise ValueError(
            f"a rollout has steps: its batch size is [*batch, time], got {list(rollout.batch_size)}"
        )
    relevance = rollout.get(key, None)
    if relevance is None:
        known = ", ".join(sorted(map(str, rollout.keys(True, True))))
        raise KeyError(f"the rollout has no relevance {key!r}; it has {known}")
    relevance = relevance.reshape(count, -1)
    if relevance.shape[-1] != len(features):
        raise ValueError(f"{key!r} has {relevance.shape[-1]} features, and {len(features)} names were given")
    taken = taken_actions(rollout, len(actions))
    if taken is None:
        actions, one_hot = (), relevance.new_zeros(len(relevance), 0)
    else:
        one_hot = nn.functional.one_hot(taken, len(actions)).to(relevance)
    counts = one_hot.sum(0)
    return Summary(
        steps=count,
        episodes=_episodes(rollout),
        features=tuple(features),
        actions=tuple(actions),
        counts=tuple(int(count) for count in counts),
        by_action=one_hot.T @ relevance / counts[:, None],
        mean=relevance.mean(0),
        magnitude=relevance.abs().mean(0),
    )


def taken_actions(rollout: TensorDictBase, count: int) -> Tensor | None:
    """Indices ``[steps]`` of the actions of a rollout, ``None`` where they are not one each out of ``count``."""
    action: Tensor | None = rollout.get("action", None)
    if action is None or count == 0:
        return None
    action = action.reshape(rollout.numel(), -1)
    if action.shape[-1] == count and _is_one_hot(action):
        return action.to(torch.int64).argmax(-1)
    if action.shape[-1] == 1 and not action.is_floating_point():
        taken = action[:, 0].to(torch.int64)
        return taken if bool(((taken >= 0) & (taken < count)).all()) else None
    return None


def _is_one_hot(action: Tensor) -> bool:
    return bool(((action == 0) | (action == 1)).all() and (action.sum(-1) == 1).all())


def _episodes(rollout: TensorDictBase) -> tuple[Episode, ...]:
    done = rollout["next", "done"].reshape(-1, rollout.batch_size[-1])
    reward = rollout["next", "reward"].reshape(*done.shape, -1).sum(-1)
    found = []
    for ends, rewards in zip(done, reward, strict=True):
        number = torch.cat([ends.new_zeros(1), ends[:-1]]).cumsum(0)  # of the episode a step belongs to
        count = int(number[-1]) + 1
        totals = rewards.new_zeros(count).index_add_(0, number, rewards)
        lengths = torch.bincount(number, minlength=count)
        finished = torch.zeros(count, dtype=torch.int64).index_add_(0, number, ends.to(torch.int64))
        found += [
            Episode(*row)
            for row in zip(totals.tolist(), lengths.tolist(), (finished > 0).tolist(), strict=True)
        ]
    return tuple(found)


@dataclass(frozen=True)
class Conservation:
    """How much of the relevance that was put in arrived at the inputs.

    Attributes:
        target: mean over the steps of the relevance that was put in, the value of the target.
        arrived: mean of what arrived at the inputs.
        absorbed: mean of what rules kept on purpose: for biases, stabilisers, constants.
        size: mean absolute target, to compare these with.
        error: the largest gap of any step, in units of ``size``: relevance that was lost or made.
    """

    target: float
    arrived: float
    absorbed: float
    size: float
    error: float

    @staticmethod
    def of(columns: Mapping[str, Tensor] | TensorDictBase) -> Conservation:
        """What a ledger comes to: ``"target"``, ``"inputs"``, ``"absorbed"`` and ``"gap"``, of any shape."""
        columns = {name: columns[name].flatten().double() for name in ("target", "inputs", "absorbed", "gap")}
        size = columns["target"].abs().mean()
        error = columns["gap"].abs().max() / size.clamp(min=torch.finfo(torch.float64).tiny)
        return Conservation(
            target=columns["target"].mean().item(),
            arrived=columns["inputs"].mean().item(),
            absorbed=columns["absorbed"].mean().item(),
            size=size.item(),
            error=error.item(),
        )

    def lines(self, against: bool = False) -> list[tuple[str, float, float | None]]:
        """What was put in, what arrived and what was kept: a label, the mean, and its share.

        Args:
            against: whether the difference from a baseline was explained. The share is one of what was put in then,
                of which all arrives, whatever the sign of each step; else it is one of the mean size of the target.
        """
        whole = self.target if against else self.size
        what = "the difference of the target from its baseline" if against else "the value of the target"
        kept = "stabilisers, constants" if against else "biases, stabilisers, constants"
        amounts = (
            (f"put in: {what}", self.target),
            ("arrived at the inputs", self.arrived),
            (f"kept on the way by {kept}", self.absorbed),
        )
        return [(label, value, value / whole if whole else None) for label, value in amounts]


def conservation(
    steps: TensorDictBase, actor: TensorDictModuleBase, composite: Composite, target: Target | Contrast
) -> Conservation | None:
    """Account for all relevance of some steps: they are explained once more, with a ledger.

    Args:
        steps: have what ``actor`` reads, and what ``target`` does.
        actor: the policy, not explained.
        composite: with what it is explained.
        target: what is explained.

    Returns:
        The account; ``None`` for a composite that gives modified gradients, of which nothing is conserved.
    """
    if any(rule.yields == "sensitivity" for _, rule in composite):
        return None
    explained = LRP(composite, target=target, ledger=True, on_unmatched="ignore").wrap(actor)
    names = ("target", "inputs", "absorbed", "gap")

    def accounts(part: TensorDictBase) -> dict[NestedKey, Tensor]:
        ledger = explained(part)["ledger"]
        return {name: ledger[name] for name in names}

    return Conservation.of(
        {str(name): column for name, column in joined(steps.reshape(-1), _AT_ONCE, accounts).items()}
    )
