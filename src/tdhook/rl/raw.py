"""From a policy's input back to what the environment gave: relevance through an environment's transforms."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor

from tdhook.keys import known_keys
from tdhook.rl.chains import Chain, times_of

if TYPE_CHECKING:
    from torchrl.envs import EnvBase

__all__ = ["frame_times", "raw_relevance", "relevance_of_frames"]


def raw_relevance(
    env: EnvBase, td: TensorDictBase, attribution_key: NestedKey = "attr", *, by_weight: bool = False
) -> TensorDict:
    """Relevance of what an environment gave, from that of what a policy was given behind the transforms.

    A transform that moves values or maps each by itself (normalisation, casts, scaling, permuting, flattening,
    concatenation, renaming) passes relevance back to where values came from; one that mixes values (pooling, resizing,
    grey scale) hands it out in proportion to contributions: ``R_i = sum_j x_i w_ij / sum_k(x_k w_kj) R_j`` (the z-rule,
    Bach et al. 2015, eq. 56). The sum is kept. Behind ``CatFrames``, each of the stacked frames has relevance of its
    own; :func:`frame_times` tells which these are.

    Args:
        env: the environment, or one made like it; its transforms are left as they are.
        td: explained steps ``[*batch]``. Where transforms mix values, the observation of the environment has to be in
            it beside what they make of it (``out_keys`` of their own), and the last axis has to be time if frames are
            stacked after that.
        attribution_key: where relevance is: that of ``key`` under ``(attribution_key, key)``.
        by_weight: whether transforms that mix values share relevance out by their weights alone, as if all values were
            the same; then these are not needed.

    Returns:
        Batch size ``[*batch]``; relevance of each observation of the environment under its own key,
        ``[*batch, *shape]``, or ``[*batch, frames, *shape]`` where frames are stacked, the oldest first. (With a target
        of several outputs, these come before.) What transforms add by themselves, such as the hidden state of a
        recurrent policy, keeps its relevance under its key.

    Raises:
        KeyError: there is no relevance, or the observation is needed and not in ``td``.
        ValueError: the environment is made of others that have transforms of their own, or a transform does not let
            relevance through.
    """
    chain = Chain.of(env)
    name = (attribution_key,) if isinstance(attribution_key, str) else tuple(attribution_key)
    found = td.get(name, None)
    if not isinstance(found, TensorDictBase):
        raise KeyError(f"there is no relevance {unravel_key(name)!r}; there are {known_keys(td)}")
    batch, axes = td.batch_size, td.batch_dims
    result = TensorDict(batch_size=batch)
    rows: dict[NestedKey, Tensor] = {}
    extras: set[torch.Size] = set()
    for key, value in found.items(True, True):
        shape = chain.shape_behind(key)
        if shape is None and chain.makes(key):
            result.set(key, value)
            continue
        extra = value.shape[axes : value.dim() - len(shape or ())]
        if shape is None or value.shape != (*batch, *extra, *shape):
            there = "no such observation" if shape is None else f"one of shape {list(shape)}"
            raise ValueError(
                f"relevance of {key!r} has shape {list(value.shape)} in a batch of {list(batch)}, and the environment "
                f"has {there}: give the environment that the policy acted in"
            )
        extras.add(extra)
        rows[key] = value.reshape(-1, *shape)
    if len(extras) > 1:
        raise ValueError(f"the relevances are of different numbers of outputs: {sorted(map(list, extras))}")
    for extra in extras:
        for key, value in chain.back(rows, td, extra, by_weight).items():
            value = value.reshape((*batch, *extra, *value.shape[1:]))
            result.set(key, value if key not in result else result.get(key) + value)
    return result


def frame_times(env: EnvBase, td: TensorDictBase) -> Tensor:
    """To which step of a rollout each of the frames belongs that ``CatFrames`` stacked.

    Args:
        env: the environment, or one made like it.
        td: steps ``[*batch, time]``. Where episodes begin is read from ``"is_init"`` (of the transform ``InitTracker``)
            or else from ``("next", "done")``, where the first step is taken to begin one, as in ``env.rollout``.

    Returns:
        Integers ``[*batch, time, frames]``, the oldest frame first: the step at which it was the present one, or -1
        for frames from before the first step, and for constant padding, which is none.

    Raises:
        KeyError: nothing tells where episodes begin.
        ValueError: no frames are stacked.
    """
    chain = Chain.of(env)
    if chain.stack is None:
        raise ValueError(f"the environment stacks no frames: there is no CatFrames in {chain}")
    return times_of(chain.steps[chain.stack], td)


def relevance_of_frames(relevance: Tensor, times: Tensor) -> Tensor:
    """What a frame meant to all the decisions that saw it: relevance of stacked frames, summed by time.

    Args:
        relevance: ``[*batch, time, frames, *shape]``, from :func:`raw_relevance`.
        times: ``[*batch, time, frames]``, from :func:`frame_times`.

    Returns:
        ``[*batch, time, *shape]``. Relevance of frames that do not belong to the rollout (time -1) is in none of it.

    Raises:
        ValueError: the shapes do not go together.
    """
    axes = times.dim()
    if axes < 2 or relevance.shape[:axes] != times.shape:
        raise ValueError(
            f"relevance of stacked frames is [*batch, time, frames, *shape], with times [*batch, time, frames]; got "
            f"{list(relevance.shape)} and {list(times.shape)}"
        )
    *batch, steps, _ = times.shape
    shape = relevance.shape[axes:]
    rows = torch.arange(torch.Size(batch).numel(), device=times.device).reshape(*batch, 1, 1) * steps + times
    there = times >= 0
    result = relevance.new_zeros(torch.Size(batch).numel() * steps, *shape)
    return result.index_add_(0, rows[there], relevance[there]).reshape(*batch, steps, *shape)
