"""What the tests of collectors, exploration and losses share: actors, and how they are explained."""

from __future__ import annotations

import copy
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from tensordict import TensorDictBase
from tensordict.nn import NormalParamExtractor, TensorDictModule
from torch import nn

from tdhook import LRP, Key, Target
from tdhook.relevance.composites.presets import epsilon_plus

pytest.importorskip("torchrl")

from torchrl.data import (
    Bounded,
)
from torchrl.envs import (
    Compose,
    DoubleToFloat,
    GymEnv,
    InitTracker,
    TransformedEnv,
)
from torchrl.modules import (
    ProbabilisticActor,
    TanhNormal,
)

from tdhook.rl import build_actor, make_env

CHOSEN = Target("action_value", "action")
ATTR = ("attr", "observation")
cartpole = partial(make_env, "CartPole-v1")


# One step alone is rounded otherwise than among many. With an epsilon of 1e-6, a unit whose sum is about that small
# passes on a share that differs by a hundredth then; with this one, by a hundred-thousandth.
STABLE = epsilon_plus(epsilon=1e-3)


def q_actor(*cells: int, inputs: int = 4, seed: int = 0) -> TensorDictModule:
    torch.manual_seed(seed)
    architecture = {
        "in_features": inputs,
        "out_features": 2,
        "num_cells": [*cells] or [16],
        "activation": "ReLU",
    }
    return build_actor("dqn_mlp", architecture)


def explain(actor: nn.Module, **options: Any) -> Any:
    return LRP(STABLE, target=CHOSEN, **options).wrap(actor)


def recomputed(actor: nn.Module, td: TensorDictBase) -> torch.Tensor:
    """The reference: of a copy of the actor, from the stored observation, for the stored action."""
    work = td.select("observation").set("taken", td["action"])
    method = LRP(STABLE, target=Target("action_value", Key("taken")), cache_weights=False)
    return method.wrap(copy.deepcopy(actor))(work)[ATTR]


def close(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """For each step, whether two relevances of it are the same.

    But for rounding, which is another for one step than for many; of other weights they differ by far more.
    """
    return ((a - b).abs() <= 1e-5 + 1e-4 * b.abs().amax(-1, keepdim=True)).all(-1)


def collecting(frames: int = 20, total: int = 40, **options: Any) -> dict[str, Any]:
    return {
        "frames_per_batch": frames,
        "total_frames": total,
        "auto_register_policy_transforms": False,
        **options,
    }


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """Fail where something hangs."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"not done after {seconds} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def pendulum() -> TransformedEnv:
    return TransformedEnv(GymEnv("Pendulum-v1"), Compose(DoubleToFloat(), InitTracker()))


def gaussian() -> ProbabilisticActor:
    net = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 2), NormalParamExtractor())
    return ProbabilisticActor(
        TensorDictModule(net, ["observation"], ["loc", "scale"]),
        in_keys=["loc", "scale"],
        distribution_class=TanhNormal,
        return_log_prob=True,
        spec=Bounded(-2, 2, (1,)),
    )


def deterministic() -> TensorDictModule:
    net = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 1), nn.Tanh())
    return TensorDictModule(net, ["observation"], ["action"])
