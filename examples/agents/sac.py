"""A squashed Gaussian policy, learned by soft actor-critic: a pendulum that is swung up and held there.

python examples/agents/sac.py
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from common import Shown, gap, main
from tensordict.nn import NormalParamExtractor, TensorDictModule
from torch import nn
from torchrl.collectors import Collector
from torchrl.data import Bounded, LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import RewardScaling
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import MLP, ProbabilisticActor, TanhNormal, ValueOperator
from torchrl.objectives import SACLoss, SoftUpdate
from vectors import PENDULUM, mean_return, several, shares

from tdhook import LRP, Key, Target
from tdhook.plots import relevance_over_time
from tdhook.rl import make_env
from tdhook.targets import LogProb

ENV, STEPS = "Pendulum-v1", 200
LARGEST_TORQUE = 2.0
FRAMES, ENVS, FRAMES_PER_BATCH, FIRST_FRAMES = 24_000, 8, 64, 1_024
FRAMES_PER_UPDATE, BATCH_SIZE = 2, 128
LEARNING_RATE, DISCOUNT, TARGET_RATE = 2e-3, 0.98, 0.01


def networks() -> tuple[ProbabilisticActor, ValueOperator]:
    """Both untrained: the policy, and the value of an observation and an action."""
    layers = MLP(in_features=3, out_features=2, num_cells=[64, 64], activation_class=nn.ReLU)
    actor = ProbabilisticActor(
        TensorDictModule(nn.Sequential(layers, NormalParamExtractor()), ["observation"], ["loc", "scale"]),
        in_keys=["loc", "scale"],
        spec=Bounded(-LARGEST_TORQUE, LARGEST_TORQUE, (1,)),
        distribution_class=TanhNormal,
        distribution_kwargs={"low": -LARGEST_TORQUE, "high": LARGEST_TORQUE},
    )
    value = MLP(in_features=4, out_features=1, num_cells=[64, 64], activation_class=nn.ReLU)
    return actor, ValueOperator(value, in_keys=["observation", "action"])


def train(seed: int) -> dict[str, Any]:
    """Collect samples of the policy, learn from a replay buffer, keep the weights that acted best."""
    actor, critic = networks()
    env = several(ENV, ENVS, seed).append_transform(RewardScaling(0.0, 0.1))
    collector = Collector(
        env,
        actor,
        frames_per_batch=FRAMES_PER_BATCH,
        total_frames=FRAMES,
        init_random_frames=FIRST_FRAMES,
        auto_register_policy_transforms=False,
    )
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(FRAMES), batch_size=BATCH_SIZE)
    loss_module = SACLoss(actor, critic, num_qvalue_nets=2, alpha_init=0.1, target_entropy=-1.0)
    loss_module.make_value_estimator(gamma=DISCOUNT)
    target = SoftUpdate(loss_module, tau=TARGET_RATE)
    optimizer = torch.optim.Adam(loss_module.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=FRAMES // FRAMES_PER_BATCH)

    best, best_return = copy.deepcopy(actor.state_dict()), float("-inf")
    for batch, data in enumerate(collector, start=1):
        buffer.extend(data.reshape(-1))
        if len(buffer) > FIRST_FRAMES:
            for _ in range(FRAMES_PER_BATCH // FRAMES_PER_UPDATE):
                losses = loss_module(buffer.sample())
                optimizer.zero_grad()
                sum(value for key, value in losses.items() if key.startswith("loss_")).backward()
                optimizer.step()
                target.step()
        schedule.step()
        if batch % 25 == 0:
            score = mean_return(ENV, actor, 10, STEPS, seed + 1)
            print(f"frames {len(buffer):6d}  mean return {score:7.1f}", flush=True)
            if score >= best_return:
                best, best_return = copy.deepcopy(actor.state_dict()), score
    collector.shutdown()
    actor.load_state_dict(best)
    facts = {"environment": ENV, "seed": seed, "frames": FRAMES, "episodes": 100}
    facts["mean return"] = mean_return(ENV, actor, facts["episodes"], STEPS, seed + 2)
    return {"weights": best, "facts": facts}


def explain(checkpoint: dict[str, Any], seed: int) -> Shown:
    """Which way it means to push, and how probable what it did was, at each step of an episode of samples.

    Both against the mean of the episode.
    """
    actor, _ = networks()
    actor.load_state_dict(checkpoint["weights"])
    with set_exploration_type(ExplorationType.RANDOM):
        rollout = make_env(ENV, seed).rollout(STEPS, actor)
    rollout["taken"] = rollout["action"]  # an explained policy acts, and writes its action
    explained = LRP("attn_lrp", target=Target("loc"), baseline="mean", ledger=True).wrap(actor)
    explained(rollout)
    relevance, largest = rollout["attr", "observation"], gap(rollout)
    taken = LogProb.of(actor, action=Key("taken"))
    probable = LRP("attn_lrp", target=taken, baseline="mean", ledger=True).wrap(actor)
    of_action = probable(rollout.select("observation", "taken"))

    upright = rollout["observation"][:, 0] > 0.95
    lines = [f"episode: return {rollout['next', 'reward'].sum():.0f}, upright in {int(upright.sum())} steps"]
    for name, part in {"loc": relevance, "log-probability": of_action["attr", "observation"]}.items():
        lines.append(f"{name}, swinging up: {shares(part[~upright], PENDULUM)}")
        lines.append(f"{name}, upright: {shares(part[upright], PENDULUM)}")
    figure = relevance_over_time(
        relevance,
        PENDULUM,
        observation=rollout["observation"],
        title="Pendulum, SAC: what speaks for turning left (red), and right (blue)",
    )
    return Shown(figure, max(largest, gap(of_action)), lines)


if __name__ == "__main__":
    main("sac", train, explain)
