"""What the tests of `Explain` share: actors and what they collected."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import nn

from tdhook import LRP, Key, Target

pytest.importorskip("torchrl")


from tdhook.rl import build_actor, make_env

CHOSEN = Target("action_value", "action")
METHOD = LRP("epsilon_plus", target=CHOSEN)
ATTR = ("attr", "observation")


def q_actor(seed: int = 0, cells: int = 16) -> TensorDictModule:
    torch.manual_seed(seed)
    architecture = {"in_features": 4, "out_features": 2, "num_cells": [cells], "activation": "ReLU"}
    return build_actor("dqn_mlp", architecture)


def collected(steps: int = 24) -> TensorDict:
    """Steps of a random policy, so that the stored actions are not those of any other."""
    return make_env("CartPole-v1", seed=0).rollout(steps, break_when_any_done=False)


def of_the_stored(actor: nn.Module, td: TensorDictBase, target: Any = None) -> torch.Tensor:
    """The reference: the target points at a copy of the stored action, which nothing overwrites."""
    work = td.select("observation").set("taken", td["action"])
    target = target or Target("action_value", Key("taken"))
    return LRP("epsilon_plus", target=target).wrap(copy.deepcopy(actor))(work)[ATTR]
