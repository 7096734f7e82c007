"""What a page shows of a rollout: entries of any shape become rows of numbers over ``[environments, time]``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor

from tdhook.configuration import write_key
from tdhook.rl.rollouts import Summary, summarise, taken_actions

__all__ = ["Course", "View", "course_of", "largest_rows", "picture_axes", "views_of"]

_SMALLEST_PICTURE = 8
"""Sides of a three-dimensional observation from which on it is taken for a picture with channels."""


@dataclass(frozen=True, eq=False)
class Course:
    """What happened, for ``environments`` times ``time`` steps.

    Attributes:
        environments: how many.
        time: steps of each.
        taken: ``[environments, time]``, index of the action; ``None`` where actions are not one of several.
        action: ``[environments, time, numbers]``, the action as it is, where ``taken`` is ``None``.
        reward: ``[environments, time]``, summed where there are several.
        ends: ``[environments, time]``, whether an episode ended with the step.
        ledger: ``[environments, time, 4]``: target, inputs, absorbed, gap.
    """

    environments: int
    time: int
    taken: Tensor | None
    action: Tensor | None
    reward: Tensor | None
    ends: Tensor
    ledger: Tensor | None

    @property
    def starts(self) -> Tensor:
        """``[environments, time]``, whether an episode begins."""
        return torch.cat([torch.ones_like(self.ends[:, :1]), self.ends[:, :-1]], dim=1)

    def cut(self, environments: int, time: int) -> Course:
        """The first environments and steps of it."""
        parts = {
            name: None if value is None else value[:environments, :time]
            for name, value in (
                ("taken", self.taken),
                ("action", self.action),
                ("reward", self.reward),
                ("ends", self.ends),
                ("ledger", self.ledger),
            )
        }
        return replace(self, environments=environments, time=time, **parts)  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class View:
    """The relevance of one key for one output.

    Attributes:
        label: what tells it from the others.
        rows: names of the features; of a picture, of its channels.
        relevance: ``[environments, time, rows]``.
        values: what was observed, likewise; ``None`` for a picture.
        maps: relevance of a picture, ``[environments, time, height, width]``, summed over channels.
        summary: of the whole rollout.
    """

    label: str
    rows: tuple[str, ...]
    relevance: Tensor
    values: Tensor | None
    maps: Tensor | None
    summary: Summary

    def cut(self, environments: int, time: int) -> View:
        """The first environments and steps of it, with the summary of all."""
        return replace(
            self,
            relevance=self.relevance[:environments, :time],
            values=None if self.values is None else self.values[:environments, :time],
            maps=None if self.maps is None else self.maps[:environments, :time],
        )


def course_of(rollout: TensorDictBase, actions: Sequence[str]) -> Course:
    """What happened in a rollout of batch size ``[*batch, time]``.

    Raises:
        ValueError: it has no steps.
    """
    if rollout.batch_dims == 0 or 0 in rollout.batch_size:
        raise ValueError(
            "there is nothing to report: a rollout has the batch size [*batch, time] with at least one step, and this "
            f"one {list(rollout.batch_size)}"
        )
    time = rollout.batch_size[-1]
    count = rollout.batch_size.numel() // time
    flat = (count, time, -1)
    action = _named(rollout, "action")
    taken = None if action is None else _taken(rollout, action, len(actions))
    reward, done = _named(rollout, "next", "reward"), _named(rollout, "next", "done")
    unknown = torch.zeros(count, time, dtype=torch.bool)
    columns = [rollout.get(("ledger", name), None) for name in ("target", "inputs", "absorbed", "gap")]
    known = [column.reshape(flat).sum(-1) for column in columns if column is not None]
    return Course(
        environments=count,
        time=time,
        taken=None if taken is None else taken.reshape(count, time).cpu(),
        action=None if taken is not None or action is None else _plain(action.reshape(flat)),
        reward=None if reward is None else _plain(reward.reshape(flat).sum(-1)),
        ends=unknown if done is None else done.reshape(flat).bool().any(-1).cpu(),
        ledger=_plain(torch.stack(known, -1)) if len(known) == len(columns) else None,
    )


def _named(rollout: TensorDictBase, *path: str) -> Tensor | None:
    """An entry of that name, at its place or, as in multi-agent rollouts, in a group beside it."""
    found = rollout.get(path, None)
    if found is None and (len(path) == 1 or path[0] in rollout):
        parent = rollout if len(path) == 1 else rollout[path[0]]
        for key in parent.keys(True, True):
            if isinstance(key, tuple) and key[-1] == path[-1] and key[0] not in ("next", "attr", "ledger"):
                found = parent[key]
                break
    return found if isinstance(found, Tensor) else None


def _taken(rollout: TensorDictBase, action: Tensor, count: int) -> Tensor | None:
    return taken_actions(TensorDict({"action": action}, rollout.batch_size), count)


def _finite(values: Tensor) -> bool:
    # NaN passes through minimum and maximum, and nothing as large as the rollout is made.
    return bool(torch.stack(values.aminmax()).isfinite().all())


def _plain(values: Tensor) -> Tensor:
    return values.detach().to("cpu", torch.float32)


def views_of(
    rollout: TensorDictBase,
    course: Course,
    keys: Sequence[NestedKey],
    features: Sequence[str] | None,
    actions: Sequence[str],
    maps: Tensor | None,
) -> list[View]:
    """One view per explained key and output.

    Args:
        rollout: of batch size ``[*batch, time]``.
        course: what happened in it.
        keys: where relevance is, ``[*batch, time, *features]``, or with ``several`` outputs
            ``[*batch, time, outputs, *features]``; what is explained lies at the same key without its first part.
        features: names for the first key.
        actions: names of the actions, for outputs that are as many.
        maps: relevance on the frames, for the views of the first key.

    Raises:
        KeyError: the rollout has no such relevance.
        ValueError: relevance is not finite, or names do not fit.
    """
    found = []
    for place, key in enumerate(keys):
        relevance = rollout.get(key, None)
        if relevance is None:
            known = ", ".join(sorted(map(str, rollout.keys(True, True))))
            raise KeyError(f"the rollout has no relevance {key!r}; it has {known}")
        if not _finite(relevance):
            raise ValueError(f"{key!r} has NaN or infinite values, which have no colour")
        read = unravel_key(key[1:] if isinstance(key, tuple) and len(key) > 1 else key)
        value = rollout.get(read, None) if read != key else None
        names = features if place == 0 else None
        parts = _parts(relevance.detach(), value, rollout.batch_dims, names, key)
        on_frames = _over_outputs(maps, rollout, len(parts)) if place == 0 and maps is not None else None
        for i, part in enumerate(parts):
            labels = [write_key(read)] if len(keys) > 1 else []
            if len(parts) > 1:
                labels.append(actions[i] if len(actions) == len(parts) else f"output {i}")
            if on_frames is not None:
                part = replace(part, maps=on_frames[i])
            found.append(_view(", ".join(labels), part, course, actions))
    return found


@dataclass(frozen=True, eq=False)
class _Part:
    """One output of one key, over ``[steps]``: what a view is made of."""

    rows: tuple[str, ...]
    relevance: Tensor
    values: Tensor | None
    maps: Tensor | None


def _parts(
    relevance: Tensor, value: Tensor | None, batch_dims: int, names: Sequence[str] | None, key: NestedKey
) -> list[_Part]:
    event = relevance.shape[batch_dims:]
    if value is not None and value.shape[batch_dims:].numel():
        event = value.shape[batch_dims:]
    elif names is not None and event.numel() != len(names):
        event = event[1:]
    steps = relevance.shape[:batch_dims].numel()
    try:
        each = relevance.reshape(steps, -1, *event).unbind(1)
    except RuntimeError:
        raise ValueError(
            f"{key!r} has the shape {list(relevance.shape)}, and what it explains {list(event)}, which do not fit"
        ) from None
    picture = picture_axes(event)
    if picture is None or (names is not None and len(names) == event.numel()):
        rows = _names(names, event, key)
        observed = None if value is None else _plain(value).reshape(steps, -1)
        return [_Part(rows, _plain(one).reshape(steps, -1), observed, None) for one in each]
    channels, sides = picture
    if names is not None and len(names) != event[channels]:
        raise ValueError(
            f"{key!r} explains a picture of shape {list(event)}: there is one name per channel, {event[channels]} of "
            f"them, and {len(names)} were given"
        )
    rows = tuple(names or (f"channel {i}" for i in range(event[channels])))
    across = tuple(side + 1 for side in sides)
    return [_Part(rows, _plain(one.sum(across)), None, _plain(one.sum(channels + 1))) for one in each]


def picture_axes(event: torch.Size) -> tuple[int, tuple[int, int]] | None:
    """Which axis of an observed picture has its channels, and which its sides; ``None`` for what is no picture."""
    if len(event) != 3:
        return None
    channels = min((0, 2), key=lambda axis: event[axis])
    sides = (1, 2) if channels == 0 else (0, 1)
    return (channels, sides) if min(event[side] for side in sides) >= _SMALLEST_PICTURE else None


def _names(names: Sequence[str] | None, event: torch.Size, key: NestedKey) -> tuple[str, ...]:
    count = event.numel()
    if names is None:
        return tuple(f"x{i}" for i in range(count))
    if len(names) == count:
        return tuple(names)
    if len(event) > 1 and len(names) == event[-1]:  # one row per agent, say
        return tuple(f"{i // len(names)}: {names[i % len(names)]}" for i in range(count))
    raise ValueError(f"{key!r} has {count} features, and {len(names)} names were given")


def _over_outputs(maps: Tensor, rollout: TensorDictBase, outputs: int) -> list[Tensor | None]:
    flat = _plain(maps).reshape(rollout.batch_size.numel(), -1, *maps.shape[-2:])
    if not _finite(flat):
        raise ValueError("the relevance on the frames has NaN or infinite values, which have no colour")
    if flat.shape[1] == outputs:
        return list(flat.unbind(1))
    if flat.shape[1] == 1:  # of one output, and it is not said of which
        return [flat[:, 0], *[None] * (outputs - 1)]
    raise ValueError(
        f"there is relevance on the frames for {flat.shape[1]} outputs, and for {outputs} on the inputs"
    )


def _view(label: str, part: _Part, course: Course, actions: Sequence[str]) -> View:
    shape = (course.environments, course.time)
    relevance = part.relevance.reshape(*shape, -1)
    reward = torch.zeros(shape) if course.reward is None else course.reward
    steps = {"relevance": relevance, "next": {"done": course.ends[..., None], "reward": reward[..., None]}}
    if course.taken is not None:
        steps["action"] = course.taken[..., None]
    return View(
        label=label,
        rows=part.rows,
        relevance=relevance,
        values=None if part.values is None else part.values.reshape(*shape, -1),
        maps=None if part.maps is None else part.maps.reshape(*shape, *part.maps.shape[1:]),
        summary=summarise(TensorDict(steps, shape), part.rows, actions, "relevance"),
    )


def largest_rows(view: View, most: int) -> list[int]:
    """The rows of largest mean absolute relevance, in their order."""
    return sorted(view.summary.magnitude.topk(min(most, len(view.rows))).indices.tolist())
