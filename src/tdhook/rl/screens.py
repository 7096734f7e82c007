"""Relevance on the screen, for policies that see the pixels of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from tensordict import TensorDictBase
from torch import Tensor

from tdhook.rl.chains import Chain
from tdhook.rl.raw import raw_relevance

if TYPE_CHECKING:
    from torchrl.envs import EnvBase

__all__ = ["put_on_screen"]


def put_on_screen(env: EnvBase, rollout: TensorDictBase) -> bool:
    """Write what a policy saw of the screen, and relevance on it, where reports and videos look for them.

    Args:
        env: the environment, with the transforms between the screen and the policy.
        rollout: explained, of batch size ``[*batch, time]``. Where it has a screen, an observation of type uint8 and
            shape ``[height, width]`` or ``[height, width, 1 or 3]``, it gets ``("attr", "frame")``,
            ``[*batch, time, (outputs,) height, width]``, summed over colours and stacked frames; and ``"frame"``,
            ``[*batch, time, height, width, 3]``, unless it was rendered.

    Returns:
        Whether there is a screen.
    """
    seen = {key: value for key, value in rollout.items(True, True) if isinstance(value, Tensor)}
    axes = rollout.batch_dims
    if not any(_is_screen(value, axes) and "next" not in key for key, value in seen.items()):
        return False
    chain = Chain.of(env)
    explained = rollout["attr"]
    # Values inside the policy have relevance too, which does not go back to the screen.
    inner = [
        key for key in explained.keys(True, True) if chain.shape_behind(key) is None and not chain.makes(key)
    ]
    raw = raw_relevance(env, rollout.copy().set("attr", explained.exclude(*inner)))
    for key, relevance in raw.items(True, True):
        screen = seen.get(key)
        if screen is None or not _is_screen(screen, axes):
            continue
        if screen.dim() - axes == 3:
            relevance = relevance.sum(-1)
        else:
            screen = screen.unsqueeze(-1)
        several = any(
            value.dim() > seen[read].dim() for read, value in explained.items(True, True) if read in seen
        )
        if relevance.dim() > axes + several + 2:
            relevance = relevance.sum(-3)
        if "frame" not in rollout:
            rollout["frame"] = screen.expand(*screen.shape[:-1], 3).contiguous()
        if rollout["frame"].shape[-3:-1] == relevance.shape[-2:]:
            rollout["attr", "frame"] = relevance
        return True
    return False


def _is_screen(value: Tensor, axes: int) -> bool:
    shape = value.shape[axes:]
    return value.dtype is torch.uint8 and (len(shape) == 2 or (len(shape) == 3 and shape[-1] in (1, 3)))
