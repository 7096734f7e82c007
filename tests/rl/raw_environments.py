"""What the tests of raw relevance share: environments of frames, and transforms of one's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

pytest.importorskip("torchrl")

from torchrl.data import Composite, Unbounded
from torchrl.envs import (
    Compose,
    EnvBase,
    TransformedEnv,
)

SHAPE = (4, 6, 3)


class Frames(EnvBase):
    """Random uint8 frames and a vector; episodes end at random."""

    def __init__(self, seed: int = 0, ends: float = 0.2, batch: tuple[int, ...] = ()) -> None:
        super().__init__(batch_size=batch)
        self.observation_spec = Composite(
            pixels=Unbounded((*batch, *SHAPE), dtype=torch.uint8), vector=Unbounded((*batch, 5)), shape=batch
        )
        self.action_spec = Unbounded((*batch, 1))
        self.reward_spec = Unbounded((*batch, 1))
        self.ends = ends
        self._set_seed(seed)

    def _set_seed(self, seed: int | None) -> None:
        self.random = torch.Generator().manual_seed(seed or 0)

    def _seen(self) -> dict[str, Tensor]:
        pixels = torch.randint(0, 256, (*self.batch_size, *SHAPE), dtype=torch.uint8, generator=self.random)
        pixels[..., :2, :, :] = 0  # black, which contributes nothing
        return {"pixels": pixels, "vector": torch.randn(*self.batch_size, 5, generator=self.random)}

    def _reset(self, tensordict: TensorDictBase | None = None, **_: Any) -> TensorDictBase:
        return TensorDict(self._seen(), self.batch_size)

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        done = torch.rand(*self.batch_size, 1, generator=self.random) < self.ends
        entries = {**self._seen(), "reward": torch.zeros(*self.batch_size, 1), "done": done}
        return TensorDict(entries, self.batch_size)


def rolled(*transforms: Any, steps: int = 7, env: EnvBase | None = None) -> tuple[TransformedEnv, TensorDict]:
    env = TransformedEnv(env or Frames(), Compose(*transforms))
    return env, env.rollout(steps, break_when_any_done=False)


def with_relevance(td: TensorDict, *keys: Any, outputs: int | None = None) -> TensorDict:
    """Made-up relevance, of numbers that are exact in single precision and sum up exactly."""
    for key in keys:
        axes, shape = td.batch_dims, td[key].shape
        if outputs is not None:
            shape = (*shape[:axes], outputs, *shape[axes:])
        td["attr", key] = torch.randint(-8, 9, shape).float()
    return td
