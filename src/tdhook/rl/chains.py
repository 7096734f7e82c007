"""Chains: the transforms of an environment in order, and how relevance goes back through each of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor

from tdhook.extras import require
from tdhook.keys import known_keys
from tdhook.rl.backwards import Back, applied, nonzero

if TYPE_CHECKING:
    from torchrl.envs import EnvBase, Transform

__all__ = ["Chain", "times_of"]

Observations: TypeAlias = "dict[NestedKey, tuple[torch.Size, torch.dtype]]"

_AT_ONCE = 64
"""How many steps go through a transform together, so that memory does not grow with the rollout."""


@dataclass
class Chain:
    """The transforms of an environment in order, and its observations before each of them and behind the last.

    Relevance on its way back is kept in rows, ``[rows, *shape]``; of frames before they are stacked,
    ``[rows, frames, *shape]``.
    """

    steps: list[Transform]
    known: list[Observations]
    stack: int | None

    @staticmethod
    def of(env: EnvBase) -> Chain:
        envs = require("torchrl.envs", "tdhook.rl")
        steps: list[Transform] = []
        base = env
        while isinstance(base, envs.TransformedEnv):
            steps = [*_flat(base.transform, envs), *steps]
            base = base.base_env
        if not steps and isinstance(base, envs.SerialEnv | envs.ParallelEnv):
            raise ValueError(
                f"the transforms of a {type(base).__name__} are those of the environments that it runs: give one of "
                "these, made by the function that made them"
            )
        spec, axes = base.output_spec, len(base.batch_size)
        known = [_observations(spec, axes)]
        for step in steps:
            spec = step.transform_output_spec(spec.clone())
            known.append(_observations(spec, axes))
        stacks = [i for i, step in enumerate(steps) if isinstance(step, envs.CatFrames)]
        if len(stacks) > 1:
            raise ValueError("relevance goes back through one CatFrames, and the environment has several")
        return Chain(steps, known, stacks[0] if stacks else None)

    def __str__(self) -> str:
        return ", ".join(type(step).__name__ for step in self.steps) or "no transform"

    def shape_behind(self, key: NestedKey) -> torch.Size | None:
        """The shape of an observation as the policy sees it."""
        found = self.known[-1].get(key)
        return None if found is None else found[0]

    def makes(self, key: NestedKey) -> bool:
        """Whether a transform adds an entry that is no observation, such as the hidden state of a policy."""
        return any(key in map(unravel_key, step.out_keys) and not step.in_keys for step in self.steps)

    def reads(self, i: int) -> list[NestedKey]:
        """Which observations the transform ``i`` reads; it may read others things too, such as rewards."""
        given = [*map(unravel_key, self.steps[i].in_keys)]
        return [key for key in (given or self.known[i]) if key in self.known[i]]

    def writes(self, i: int) -> list[NestedKey]:
        """Which observations the transform ``i`` writes."""
        given = [*map(unravel_key, self.steps[i].out_keys)]
        if not given:
            given = [*self.known[i + 1]] if _maps(self.steps[i]) else []
        return [key for key in given if key in self.known[i + 1]]

    def back(
        self, relevance: dict[NestedKey, Tensor], td: TensorDictBase, extra: torch.Size, by_weight: bool
    ) -> dict[NestedKey, Tensor]:
        """Bring relevance back to where the first transform starts, or to the transform that made an entry."""
        single, stacked, made = dict(relevance), dict[NestedKey, Tensor](), dict[NestedKey, Tensor]()
        for i in reversed(range(len(self.steps))):
            if i == self.stack:
                stacked = self._unstack(single)
                continue
            if not self.reads(i) or not _maps(self.steps[i]):
                made.update((key, single.pop(key)) for key in self.writes(i) if key in single)
                continue

            def values(i: int = i, frames: bool = False) -> dict[NestedKey, Tensor]:
                return self._values(i, td, extra, frames)

            single = self._through(i, single, None if by_weight else values)
            if stacked:
                count = next(iter(stacked.values())).shape[1]
                rows = {key: r.flatten(0, 1) for key, r in stacked.items()}
                rows = self._through(i, rows, None if by_weight else partial(values, frames=True))
                stacked = {key: r.unflatten(0, (-1, count)) for key, r in rows.items()}
        for key, r in single.items():
            if key not in stacked:
                stacked[key] = r
            else:  # the policy saw it by itself too: what it saw is the last of the frames
                stacked[key][:, -1] += r
        for key, r in made.items():
            stacked[key] = stacked[key] + r if key in stacked else r
        return stacked

    def _unstack(self, relevance: dict[NestedKey, Tensor]) -> dict[NestedKey, Tensor]:
        assert self.stack is not None
        step = self.steps[self.stack]
        frames: dict[NestedKey, Tensor] = {}
        for before, behind in zip(step.in_keys, step.out_keys, strict=True):
            r = relevance.pop(unravel_key(behind), None)
            if r is not None:
                axis = r.dim() + step.dim
                frames[unravel_key(before)] = r.unflatten(axis, (step.N, -1)).movedim(axis, 1).contiguous()
        return frames

    def _through(
        self, i: int, relevance: dict[NestedKey, Tensor], values: Callable[[], dict[NestedKey, Tensor]] | None
    ) -> dict[NestedKey, Tensor]:
        """Relevance before the transform ``i``, given that behind it."""
        step, reads = self.steps[i], self.reads(i)
        writes = [key for key in self.writes(i) if key in relevance]
        if not writes:
            return relevance
        found = {key: r for key, r in relevance.items() if key not in writes}
        if hasattr(step, "frozen_copy"):  # running normalisation, each value by itself
            names = dict(zip(map(unravel_key, step.out_keys), map(unravel_key, step.in_keys), strict=True))
            pulled = {names[key]: relevance[key] for key in writes}
        else:
            before = {key: self.known[i][key] for key in reads}
            pulled = self._pulled(Back(step, reads, writes), before, relevance, values)
        for key, r in pulled.items():
            found[key] = found[key] + r if key in found else r
        return found

    def _pulled(
        self,
        back: Back,
        before: Observations,
        relevance: dict[NestedKey, Tensor],
        values: Callable[[], dict[NestedKey, Tensor]] | None,
    ) -> dict[NestedKey, Tensor]:
        rows = len(relevance[back.writes[0]])

        def alike(count: int) -> dict[NestedKey, Tensor]:
            return {key: torch.ones(count, *shape, dtype=dtype) for key, (shape, dtype) in before.items()}

        given = None
        if values is not None and back.depends_on_values(
            alike(1), {key: relevance[key][:1] for key in back.writes}
        ):
            given = values()
        parts = []
        for start in range(0, rows, _AT_ONCE):
            part = {key: relevance[key][start : start + _AT_ONCE] for key in back.writes}
            x = alike(len(part[back.writes[0]]))
            if given is not None:
                x = {key: given[key][start : start + _AT_ONCE] for key in before}
            parts.append(back(x, part))
        return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}

    def _values(self, i: int, td: TensorDictBase, extra: torch.Size, frames: bool) -> dict[NestedKey, Tensor]:
        """What the transform ``i`` was given: what the environment gave, behind the transforms before ``i``."""
        name = type(self.steps[i]).__name__
        if self.stack is not None and i > self.stack:
            raise ValueError(
                f"{name} mixes values of stacked frames, which are not at hand: pass by_weight=True"
            )
        given = {key: self._value(key, i, td, name) for key in self.reads(i)}
        if frames:
            assert self.stack is not None
            times = times_of(self.steps[self.stack], td)
            given = {key: _at_times(value, times) for key, value in given.items()}
        count, axes = td.batch_size.numel(), td.batch_dims
        rows: dict[NestedKey, Tensor] = {}
        for key, value in given.items():
            # Where several outputs are explained, each looks at the same values.
            shape = value.shape[axes:]
            each = value.reshape(count, 1, *shape).expand(count, extra.numel(), *shape)
            rows[key] = nonzero(each.flatten(0, 1 + frames))
        return rows

    def _value(self, key: NestedKey, i: int, td: TensorDictBase, name: str) -> Tensor:
        """An observation before the transform ``i``, ``[*batch, *shape]``: as the batch has it, or made once more."""
        made = [j for j in range(i) if key in self.writes(j)]
        there = self._in_batch(key, made[-1] + 1 if made else 0, td)
        if there is not None:
            return there
        if not made or self.stack in range(made[-1], i):
            raise KeyError(
                f"{name} mixes values, so that their shares depend on {key!r} as the environment gave it, which is "
                "not in the batch: give the transforms out_keys of their own, so that it stays there, or pass "
                "by_weight=True"
            )
        before = {read: self._value(read, made[-1], td, name) for read in self.reads(made[-1])}
        again = applied(self.steps[made[-1]], TensorDict(before, td.batch_size).reshape(-1))
        return again.get(key).unflatten(0, td.batch_size) if td.batch_dims else again.get(key)[0]

    def _in_batch(self, key: NestedKey, i: int, td: TensorDictBase) -> Tensor | None:
        """An observation before the transform ``i``, if the batch still has it as it was, under whichever key."""
        for j in range(i, len(self.steps)):
            step = self.steps[j]
            if type(step).__name__ == "RenameTransform" and key in self.reads(j):
                names = dict(
                    zip(map(unravel_key, step.in_keys), map(unravel_key, step.out_keys), strict=True)
                )
                renamed = self._in_batch(names[key], j + 1, td)
                if renamed is not None:
                    return renamed
            if key in self.writes(j) or key not in self.known[j + 1]:
                return None
        value: Tensor | None = td.get(key, None)
        there = value is not None and value.shape == (*td.batch_size, *self.known[-1][key][0])
        return value if there else None


def _flat(transform: Transform | None, envs: ModuleType) -> list[Transform]:
    if transform is None:
        return []
    return (
        [step for t in transform for step in _flat(t, envs)]
        if isinstance(transform, envs.Compose)
        else [transform]
    )


def _maps(step: Transform) -> bool:
    """Whether a transform does something to observations: others count steps, sum rewards, add entries of their own."""
    return (
        bool(step.in_keys)
        or not (step.out_keys or type(step).__module__.startswith("torchrl."))
        or _calls(step)
    )


def _calls(step: Transform) -> bool:
    """Whether it is a plain function that was appended to an environment."""
    return type(step).__name__ == "_CallableTransform"


def _observations(spec: Any, axes: int) -> Observations:
    found: Observations = {}
    for key, leaf in spec["full_observation_spec"].items(True, True):
        dtype = leaf.dtype if leaf.dtype.is_floating_point else torch.get_default_dtype()
        found[unravel_key(key)] = (leaf.shape[axes:], dtype)
    return found


def times_of(step: Transform, td: TensorDictBase) -> Tensor:
    """The step that each of the frames is of which ``step``, a CatFrames, stacked."""
    if not td.batch_dims:
        raise ValueError(
            "frames are stacked along time, which is the last axis of a batch, and this one has no axes"
        )
    begins = td.get("is_init", None)
    if begins is None:
        if td.get(("collector", "traj_ids"), None) is not None:
            raise KeyError(
                "a collector's batch may begin in the middle of an episode, and has no 'is_init' to tell: append the "
                "transform InitTracker to the environment"
            )
        done = td.get(("next", "done"), None)
        if done is None:
            raise KeyError(
                f"neither 'is_init' nor ('next', 'done') tells where episodes begin; there are {known_keys(td)}"
            )
        done = done.reshape(td.batch_size)
        begins = torch.cat([torch.ones_like(done[..., :1]), done[..., :-1]], -1)
    begins = begins.reshape(td.batch_size)
    now = torch.arange(td.batch_size[-1], device=begins.device)
    start = torch.where(begins, now, -1).cummax(-1).values[..., None]
    times = now[:, None] - torch.arange(step.N - 1, -1, -1, device=begins.device)
    padding = start if step.padding == "same" else torch.full_like(start, -1)
    return torch.where((start >= 0) & (times < start), padding, times.clamp(min=-1))


def _at_times(value: Tensor, times: Tensor) -> Tensor:
    """Values ``[*batch, time, *shape]`` of the frames; where they are not at hand, all the same."""
    *batch, steps, _ = times.shape
    first = torch.arange(torch.Size(batch).numel(), device=times.device).reshape(*batch, 1, 1) * steps
    found = value.flatten(0, len(batch))[first + times.clamp(min=0)]
    found[times < 0] = 1
    return found
