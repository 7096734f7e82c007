"""The step before: what a value was a step earlier in its trajectory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor

from tdhook.keys import parts_of
from tdhook.models.entries import is_batch

__all__ = ["PREVIOUS", "markers", "step_before"]

PREVIOUS = "previous"

_ENDS = ("done", "terminated", "truncated")


def step_before(key: NestedKey, value: Tensor, td: TensorDictBase) -> Tensor:
    """What a value was a step before; at the start of a trajectory what it is.

    Where the TensorDict says it itself, under ``("previous", key)``, it is that. Otherwise it is looked up along the
    axis of time: the one that is named ``"time"``, or the last one of what was recorded, which has entries under
    ``"next"``.

    Args:
        key: of the value.
        value: ``[*batch, *shape]``.
        td: of batch size ``[*batch]``. A step has none before it where ``"is_init"`` says that a trajectory begins,
            where ``("next", "done")``, ``"terminated"`` or ``"truncated"`` said that one ended, where
            ``("collector", "traj_ids")`` is another one, or where it is not what came ``"next"``. Flags of a group of
            agents are those of its entries, agent by agent, and of others only where there are no other flags.

    Raises:
        ValueError: nothing says which axis is time, or the batch is no trajectory along it.
    """
    told: Tensor | None = td.get((PREVIOUS, *parts_of(key)), None)
    if told is not None:
        return told.to(value)
    axis = _time(td)
    before = _shifted(value, axis)
    begins = _begins(key, td, axis)
    broken = _broken(key, value, td, axis, begins)
    if broken is not None:
        begins = broken if begins is None else begins | broken
    if begins is None:
        return before
    return torch.where(begins.reshape(begins.shape + (1,) * (value.dim() - begins.dim())), value, before)


def markers(td: TensorDictBase) -> list[NestedKey]:
    """The entries of a TensorDict that tell what was a step before, and where trajectories begin and end."""
    found: list[NestedKey] = [name for name in (PREVIOUS, "is_init") if name in td]
    found += [key for key in td.keys(True, True) if _is_flag(parts_of(key))]
    return found


def _is_flag(parts: tuple[str, ...]) -> bool:
    ends = parts[0] == "next" and parts[-1] in _ENDS
    return ends or parts[-1] in ("is_init", "traj_ids")


def _time(td: TensorDictBase) -> int:
    names: list[str | None] = td.names if td.batch_dims else []
    for axis, name in enumerate(names):
        if name == "time":
            return axis
    last: int = td.batch_dims - 1
    if last >= 0 and "next" in td:
        return last
    raise ValueError(
        f'baseline="previous" is the step before, and nothing says which axis of the batch {list(td.batch_size)} is '
        'time: name it, td.names = [..., "time"]; where a policy acts, have the environment tell by the transform '
        "tdhook.rl.StepBefore()"
    )


def _shifted(value: Tensor, axis: int) -> Tensor:
    """What was a step before; the first step is taken to come after itself, so that nothing changes there."""
    first = value.narrow(axis, 0, 1)
    return torch.cat([first, value.narrow(axis, 0, value.shape[axis] - 1)], axis)


def _begins(key: NestedKey, td: TensorDictBase, axis: int) -> Tensor | None:
    """Which steps are the first of their trajectory, as far as flags tell, ``[*batch, *agents]``."""
    found: Tensor | None = None
    for begins in _told(key, td, axis):
        found = begins if found is None else found | begins
    return found


def _told(key: NestedKey, td: TensorDictBase, axis: int) -> Iterator[Tensor]:
    flags = [parts for parts in map(parts_of, td.keys(True, True)) if _is_flag(parts)]
    ours = [parts for parts in flags if _is_of(parts, parts_of(key))]
    each = _elements(key, td)
    for parts in ours or flags:
        flag = td.get(parts)
        if parts[-1] == "is_init":
            yield _by_element(flag, each, td.batch_dims)
        elif parts[-1] == "traj_ids":
            yield _by_element(flag != _shifted(flag, axis), each, td.batch_dims)
        else:
            yield _shifted(_by_element(flag, each, td.batch_dims), axis)


def _is_of(flag: tuple[str, ...], key: tuple[str, ...]) -> bool:
    """Whether a flag is that of all, or of the group that an entry belongs to."""
    group = flag[flag[0] in ("next", "collector") : -1]
    return key[: len(group)] == group


def _elements(key: NestedKey, td: TensorDictBase) -> torch.Size:
    """What has trajectories of its own, ``[*batch]``, or ``[*batch, *agents]`` for an entry of a group of agents."""
    group = parts_of(key)[:-1]
    own = td.get(group, None) if group else td
    size: torch.Size = (own if is_batch(own) else td).batch_size
    return size


def _by_element(flag: Tensor, each: torch.Size, batch_dims: int) -> Tensor:
    """A flag of each element, ``[*batch, *agents]``: of what is below, it holds where any does."""
    axes = batch_dims
    while axes < min(len(each), flag.dim()) and flag.shape[axes] == each[axes]:
        axes += 1
    found = flag.reshape(*flag.shape[:axes], -1).any(-1)
    return found.reshape(*found.shape, *(1,) * (len(each) - axes)).expand(each)


def _broken(
    key: NestedKey, value: Tensor, td: TensorDictBase, axis: int, begins: Tensor | None
) -> Tensor | None:
    """Where a value is not what the step before it has under ``"next"``, as where a buffer joined slices.

    Raises:
        ValueError: it mostly is not, as in what a buffer drew at random.
    """
    after = td.get(unravel_key(("next", *parts_of(key))), None)
    if after is None:
        return None
    differs = (_shifted(after, axis) != value).reshape(*_elements(key, td), -1).any(-1)
    if torch.compiler.is_compiling():
        return differs
    goes_on = torch.ones_like(differs) if begins is None else ~begins
    goes_on.narrow(axis, 0, 1).fill_(False)
    if 2 * int((differs & goes_on).sum()) > int(goes_on.sum()):
        raise ValueError(
            f'baseline="previous" is the step before along axis {axis} of the batch, and there {key!r} is mostly not '
            "what the step before has under 'next': give whole trajectories (a SliceSampler draws them), or record "
            "the step before with the transform tdhook.rl.StepBefore()"
        )
    return differs
