"""The return that an agent loses when it no longer sees what its explanations say is relevant."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor

from tdhook.evaluation.intervals import Figures
from tdhook.evaluation.perturbation import ranked
from tdhook.evaluation.runs import Method, bound, quiet, relevance_of
from tdhook.passes.rows import rows_of
from tdhook.perturbing.baselines import Baseline, Replacements
from tdhook.perturbing.features import Features, Groups
from tdhook.targets import TargetLike

if TYPE_CHECKING:
    from torchrl.envs import EnvBase

__all__ = ["MaskedPolicy", "ReturnLost", "Which", "return_lost"]

Which: TypeAlias = Literal["most", "least", "random"]
"""Which features are hidden: the most relevant ones, the least relevant ones, or any."""


@dataclass(frozen=True, eq=False)
class ReturnLost(Figures):
    """Returns of the same episodes, with and without some of the features.

    Attributes:
        count: how many features were hidden at each step; where they differ in size, as many entries as so many
            features have on average.
        features: of how many.
        seen: ``[episodes]``, returns of the agent that sees all.
        most: ``[episodes]``, without the most relevant features.
        least: ``[episodes]``, without the least relevant ones.
        random: ``[episodes]``, without as many that were drawn by lot.
    """

    count: int
    features: int
    seen: Tensor
    most: Tensor
    least: Tensor
    random: Tensor

    def lost(self, which: Which = "most") -> float:
        """Mean of the return that hiding those features cost."""
        hidden: Tensor = getattr(self, which)
        return (self.seen - hidden).mean().item()

    @property
    def more_than_random(self) -> float:
        """How much more is lost without the most relevant features than without features drawn by lot."""
        return self.lost("most") - self.lost("random")

    def figures(self) -> dict[str, Tensor]:
        """Returns, and what hiding features cost in each episode."""
        returns = {name: getattr(self, name) for name in ("seen", "most", "least", "random")}
        lost = {f"lost, {name}": self.seen - returns[name] for name in ("most", "least", "random")}
        return {**returns, **lost}

    def to_dict(self) -> dict[str, object]:
        """Mean returns and what was hidden, as plain data."""
        means = {name: getattr(self, name).mean().item() for name in ("seen", "most", "least", "random")}
        return {"hidden": self.count, "features": self.features, "episodes": len(self.seen), **means}


class MaskedPolicy(TensorDictModuleBase):
    """A policy that does not see some of the features of its observation, chosen anew at each step by relevance.

    It explains what the policy would do with the whole observation, replaces features, and lets the policy act on what
    is left. The observation in the TensorDict stays as it is.

    Args:
        actor: the policy, not explained.
        method: what explains it.
        count: how many features are hidden; where they differ in size, as many entries as so many have on average.
        which: which of them.
        target: what is explained; by default what ``method`` explains.
        keys: inputs whose features are hidden; by default all that have relevance.
        groups: features that are hidden together.
        baseline: what they are replaced by.
        data: what baselines ``"mean"`` and ``"sample"`` are taken of; TensorDicts with these inputs.
        absolute: whether features are ordered by the size of their relevance; else those that speak against the
            action are the least relevant.
        attribution_key: where relevance is.
        seed: of lots.
    """

    def __init__(
        self,
        actor: TensorDictModuleBase,
        method: Method,
        count: int,
        which: Which = "most",
        *,
        target: TargetLike = None,
        keys: Sequence[NestedKey] | None = None,
        groups: Groups = None,
        baseline: Baseline = 0.0,
        data: TensorDictBase | None = None,
        absolute: bool = True,
        attribution_key: NestedKey = "attr",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if which not in ("most", "least", "random"):
            raise ValueError(f"which={which!r} is none of 'most', 'least', 'random'")
        self.in_keys, self.out_keys = list(actor.in_keys), list(actor.out_keys)
        self.actor, self.count, self.which = actor, count, which
        self._method, self._target = method, target
        self._keys, self._groups, self._baseline, self._data = keys, groups, baseline, data
        self._absolute, self._attribution_key = absolute, attribution_key
        self._chance = torch.Generator().manual_seed(seed)
        self._draws = torch.Generator().manual_seed(seed)
        self._explain: Callable[[TensorDictBase], TensorDictBase] | None = None
        self.features: Features | None = None
        self._replace: Replacements | None = None

    def forward(self, td: TensorDictBase) -> TensorDictBase:
        """Act on what is left of the observation, and write what the policy writes."""
        if self.count == 0:
            return self.actor(td)
        chosen = self.hidden(td)
        rows = rows_of(td, td.batch_dims)
        assert self.features is not None and self._replace is not None
        seen = self.features.replaced(rows, self._replace(rows), chosen)
        work = td.copy()
        for key in self.features.keys:
            work.set(key, seen.get(key).reshape(td.get(key).shape))
        acted = self.actor(work)
        for key in self.out_keys:
            td.set(key, acted.get(key))
        return td

    def hidden(self, td: TensorDictBase) -> Tensor:
        """Which features are hidden, as truth values ``[rows, features]``."""
        rows = rows_of(td, td.batch_dims)
        if self.features is None or self.which != "random":
            relevance = self._relevance(rows)
        if self.features is None:
            keys = list(relevance) if self._keys is None else [unravel_key(key) for key in self._keys]
            self.features = Features.of(rows, keys, self._groups)
            source = rows if self._data is None else rows_of(self._data, self._data.batch_dims)
            self._replace = Replacements(self._baseline, self.features, source, self._draws)
        count = self.features.count
        if not 0 <= self.count <= count:
            raise ValueError(f"{self.count} features are to be hidden, and there are {count}")
        if self.which == "random":
            worth = torch.zeros(len(rows), count, device=rows.device)
        else:
            worth = self.features.by_entry(relevance)
        rank = ranked(worth, self._absolute, self._chance)
        if self.which == "least":
            rank = count - 1 - rank
        return rank < self.count if self.features.alike else self._within_share(rank)

    def _within_share(self, rank: Tensor) -> Tensor:
        """The first features that have the share of the entries that ``count`` of them have on average.

        One that is larger than what is left of the share is hidden so often that the share is kept on average.
        """
        assert self.features is not None
        extent = self.features.extent.to(rank.device)
        sorted_ = torch.zeros_like(rank).scatter_(1, rank, extent.expand_as(rank))
        before = (sorted_.cumsum(1) - sorted_).gather(1, rank)
        left = self.count * extent.sum() / self.features.count - before
        lots = torch.rand(rank.shape[0], 1, generator=self._chance, dtype=torch.float64).to(rank.device)
        return lots < left / extent

    def _relevance(self, rows: TensorDictBase) -> dict[NestedKey, Tensor]:
        if self._explain is None:
            self._explain = bound(self._method, self.actor, self._target)
        return relevance_of(self._explain(rows.copy()), self._attribution_key)


def return_lost(
    env: EnvBase,
    actor: TensorDictModuleBase,
    method: Method,
    *,
    count: int | None = None,
    fraction: float | None = None,
    target: TargetLike = None,
    keys: Sequence[NestedKey] | None = None,
    groups: Groups = None,
    baseline: Baseline = "mean",
    absolute: bool = True,
    episodes: int = 10,
    max_steps: int = 1000,
    attribution_key: NestedKey = "attr",
    seed: int = 0,
) -> ReturnLost:
    """Let an agent act without the features that matter to it, in the real environment.

    At each step the policy is explained for what it would do; the most relevant features of its observation are
    replaced; and it acts on that. The same episodes (the same seeds) are played with all features, without the most
    relevant, without the least relevant, and without as many drawn by lot at each step. The policy acts greedily.

    Args:
        env: a torchrl environment, also of several at once; it is seeded and reset.
        actor: the policy, not explained.
        method: what explains it.
        count: how many features are hidden at each step; where they differ in size, as many entries as so many have
            on average, so that the most relevant ones are not more of the observation than those drawn by lot.
        fraction: or which share of them, at least one.
        target: what is explained; by default what ``method`` explains.
        keys: inputs whose features are hidden; by default all that have relevance.
        groups: features that are hidden together (:func:`~tdhook.evaluation.patches`).
        baseline: what they are replaced by; ``"mean"`` and ``"sample"`` are taken of what the agent sees in the
            episodes in which it sees all.
        absolute: whether features are ordered by the size of their relevance, so that what speaks against an action
            matters as what speaks for it; else hiding what is least relevant hides what speaks against it.
        episodes: how many, for each of the environments.
        max_steps: after how many steps an episode is cut off.
        attribution_key: where relevance is.
        seed: of the first episode, further ones have the next numbers; and of lots.

    Returns:
        The returns, sums of rewards that are not discounted (over all agents, where there are several).

    Raises:
        ValueError: neither or both of ``count`` and ``fraction`` are given, or there are not so many features, or no
            episode or step.
    """
    if (count is None) == (fraction is None):
        raise ValueError("give count, the number of features that are hidden, or fraction, the share of them")
    if fraction is not None and not 0 < fraction <= 1:
        raise ValueError(f"fraction is a share of the features, above 0 and at most 1; got {fraction}")
    if episodes < 1 or max_steps < 1:
        raise ValueError(f"there is nothing to play: episodes={episodes}, max_steps={max_steps}")
    options: dict[str, Any] = {
        "target": target,
        "keys": keys,
        "groups": groups,
        "baseline": baseline,
        "absolute": absolute,
        "attribution_key": attribution_key,
        "seed": seed,
    }
    with quiet(actor, seed):
        seen: list[TensorDictBase] = []
        returns = {"seen": _play(env, actor, episodes, max_steps, seed, seen)}
        data = torch.cat(seen)
        probe = MaskedPolicy(actor, method, 0, data=data, **options)
        probe.hidden(data[:1])
        assert probe.features is not None
        features = probe.features.count
        hidden = count if fraction is None else max(1, round(fraction * features))
        assert hidden is not None
        for which in ("most", "least", "random"):
            policy = MaskedPolicy(actor, method, hidden, which, data=data, **options)
            returns[which] = _play(env, policy, episodes, max_steps, seed)
    return ReturnLost(hidden, features, **returns)


def _play(
    env: EnvBase,
    policy: TensorDictModuleBase,
    episodes: int,
    max_steps: int,
    seed: int,
    seen: list[TensorDictBase] | None = None,
) -> Tensor:
    """Returns of whole episodes, ``[episodes]``; what the policy reads is put into ``seen``, ``[steps]`` each."""
    found = []
    for episode in range(episodes):
        env.set_seed(seed + episode)
        td = env.reset()
        total = torch.zeros(env.batch_size, dtype=torch.float64, device=td.device)
        alive = torch.ones(env.batch_size, dtype=torch.bool, device=td.device)
        for _ in range(max_steps):
            if seen is not None:
                seen.append(td.select(*policy.in_keys, strict=False).reshape(-1)[alive.reshape(-1)])
            after, td = env.step_and_maybe_reset(policy(td))
            total += alive * _summed(after, env.reward_keys, env.batch_dims)
            ended = torch.stack([_any(after["next"].get(key), env.batch_dims) for key in _whole(env)]).any(0)
            alive &= ~ended
            if not bool(alive.any()):
                break
        found.append(total.reshape(-1).cpu())
    return torch.cat(found)


def _whole(env: EnvBase) -> list[NestedKey]:
    """The entries that say that an episode is over, for all agents where there are several."""
    keys = [unravel_key(key) for key in env.done_keys]
    short = min(1 if isinstance(key, str) else len(key) for key in keys)
    return [key for key in keys if (1 if isinstance(key, str) else len(key)) == short]


def _summed(after: TensorDictBase, keys: Sequence[NestedKey], axes: int) -> Tensor:
    rewards = [after["next"].get(key).to(torch.float64) for key in keys]
    return torch.stack([reward.flatten(axes).sum(-1) for reward in rewards]).sum(0)


def _any(done: Tensor, axes: int) -> Tensor:
    return done.flatten(axes).any(-1)
