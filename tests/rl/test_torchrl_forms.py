"""torchrl's own environments and policies as their users put them together: lazy, of bytes, of agents, in chunks."""

from __future__ import annotations

import ale_py
import gymnasium
import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import NormalParamExtractor, TensorDictModule
from torch import nn
from torchrl.data import Composite, OneHot
from torchrl.envs import (
    Compose,
    GymEnv,
    InitTracker,
    SerialEnv,
    StepCounter,
    TransformedEnv,
    VmasEnv,
)
from torchrl.modules import (
    MLP,
    MultiAgentMLP,
    MultiStepActorWrapper,
    ProbabilisticActor,
    QValueActor,
    TanhNormal,
)
from torchrl.modules.models import ACTModel

from tdhook import LRP, Target
from tdhook.targets import LogProb


@pytest.fixture(scope="module", autouse=True)
def registered():
    gymnasium.register_envs(ale_py)
    gym = pytest.importorskip("minatar.gym")
    if "MinAtar/Breakout-v1" not in gymnasium.registry:
        gym.register_envs()


class Frames(nn.Module):
    """Reads frames as they come, channels last."""

    def __init__(self, scale, stride, actions):
        super().__init__()
        self.scale = scale
        self.convolution, self.last = nn.LazyConv2d(4, stride, stride), nn.LazyLinear(actions)

    def forward(self, x):
        return self.last(self.convolution(x.movedim(-1, -3) / self.scale).relu().flatten(-3))


def acting(network, key, actions):
    return QValueActor(network, spec=Composite(action=OneHot(actions)), in_keys=[key])


def explained(policy, target=None):
    chosen = Target("action_value", "action") if target is None else target
    return LRP("epsilon_plus", target=chosen, ledger=True).wrap(policy)


def test_atari_frames_and_lazy_layers():
    rollout = GymEnv("ALE/Freeway-v5").rollout(3, explained(acting(Frames(255, 16, 3), "pixels", 3)))
    assert rollout["pixels"].dtype is torch.uint8
    assert rollout["attr", "pixels"].shape == rollout["pixels"].shape == (3, 210, 160, 3)
    assert rollout["attr", "pixels"].abs().sum() > 0 and rollout["ledger", "gap"].abs().max() < 1e-5
    several = SerialEnv(2, lambda: GymEnv("ALE/Freeway-v5"))
    several = several.rollout(2, explained(acting(Frames(255, 16, 3), "pixels", 3)))
    assert several["attr", "pixels"].shape == (2, 2, 210, 160, 3)


def test_minatar_planes_of_truth_values():
    env = GymEnv("MinAtar/Breakout-v1")
    actions = env.action_spec.shape[-1]
    rollout = env.rollout(5, explained(acting(Frames(1.0, 3, actions), "observation", actions)))
    assert rollout["observation"].dtype is torch.bool
    assert rollout["attr", "observation"].shape == (5, 10, 10, 4)
    assert rollout["ledger", "gap"].abs().max() < 1e-5
    assert rollout["attr", "observation"][~rollout["observation"]].abs().max() == 0


def test_a_lazy_policy_acts_as_it_does_unexplained():
    def rollout(wrap):
        torch.manual_seed(0)
        policy = wrap(acting(MLP(out_features=2, num_cells=[8]), "observation", 2))
        env = GymEnv("CartPole-v1")
        env.set_seed(0)
        return env.rollout(10, policy)

    plain, ours = rollout(lambda policy: policy), rollout(explained)
    assert torch.equal(plain["action"], ours["action"])
    assert torch.equal(plain["action_value"], ours["action_value"])
    assert ours["attr", "observation"].shape == ours["observation"].shape


def test_agents_of_vmas():
    pytest.importorskip("vmas")
    env = VmasEnv("navigation", num_envs=2, n_agents=3, seed=0)
    network = MultiAgentMLP(None, 4, 3, centralized=False, share_params=True, depth=1, num_cells=8)
    policy = ProbabilisticActor(
        TensorDictModule(
            nn.Sequential(network, NormalParamExtractor()),
            [("agents", "observation")],
            [("agents", "loc"), ("agents", "scale")],
        ),
        in_keys=[("agents", "loc"), ("agents", "scale")],
        out_keys=[("agents", "action")],
        distribution_class=TanhNormal,
    )
    rollout = env.rollout(4, explained(policy, Target(("agents", "loc"), 0)))
    assert rollout["attr", "agents"].batch_size == rollout["agents"].batch_size == (2, 4, 3)
    assert rollout["attr", "agents"].names == rollout["agents"].names
    assert rollout["ledger", "gap"].abs().max() < 1e-5
    td = explained(policy, LogProb.of(policy))(rollout.select(("agents", "observation")))
    assert td["log_prob"].shape == (2, 4, 3) and td["attr", "agents"].batch_size == (2, 4, 3)


class Chunks(nn.Module):
    """Plans five actions at once."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 5)

    def forward(self, x):
        return self.layer(x).unflatten(-1, (5, 1)).tanh()


def test_chunks_of_actions():
    """A chunk is explained where it was planned; the steps that follow only carry it out."""
    torch.manual_seed(0)
    policy = TensorDictModule(Chunks(), ["observation"], ["action"])
    env = SerialEnv(2, lambda: GymEnv("Pendulum-v1"))
    env = TransformedEnv(env, Compose(StepCounter(), InitTracker()))
    rollout = env.rollout(12, MultiStepActorWrapper(policy, n_steps=5))
    planned = rollout["counter"].squeeze(-1) == 1
    assert planned.sum(-1).tolist() == [3, 3]
    target = Target("action", [(step, 0) for step in range(5)])
    plans = explained(policy, target)(rollout[planned].select("observation"))
    assert plans["attr", "observation"].shape == (6, 5, 3)
    assert plans["ledger", "gap"].abs().max() < 1e-5
    assert torch.equal(plans["action"][:, 0], rollout["action"][planned])


def test_an_action_chunking_transformer():
    torch.manual_seed(0)
    network = ACTModel(
        4, 2, chunk_size=5, hidden_dim=16, nheads=2, num_encoder_layers=1, num_decoder_layers=1
    ).eval()
    policy = TensorDictModule(network, ["observation", "action_chunk"], ["action", "mu", "log_var"])
    td = TensorDict({"observation": torch.randn(3, 4)}, [3])  # the chunk is there in training only
    td = LRP("attn_lrp", target=Target("action", (0, 1)), ledger=True).wrap(policy)(td)
    assert td["action"].shape == (3, 5, 2) and set(td["attr"].keys()) == {"observation"}
    assert td["ledger", "gap"].abs().max() < 1e-5
