"""The loop that the scripts of discrete Q-learning share: they differ in the network and in the loss."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from tensordict.nn import TensorDictModuleBase, TensorDictSequential
from torch.nn.functional import one_hot
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import RewardScaling
from torchrl.modules import EGreedyModule
from torchrl.objectives import LossModule, SoftUpdate
from vectors import mean_return, several


@dataclass(frozen=True)
class Plan:
    """How to learn.

    Attributes:
        env: gymnasium id.
        steps: how long an episode may be.
        frames: steps to learn from, of all environments together.
        envs: how many environments act at once.
        frames_per_batch: steps between two rounds of updates.
        frames_per_update: how many steps are taken for each update.
        batch_size: of an update.
        learning_rate: of Adam, at the beginning; it falls to a twentieth.
        target_rate: share of the new weights in those of the target network, per update.
        reward_scale: what a reward is multiplied by.
        check_every: batches between two evaluations, of which the best one's weights are kept.
        check_episodes: of such an evaluation.
    """

    env: str
    steps: int
    frames: int
    envs: int = 8
    frames_per_batch: int = 128
    frames_per_update: int = 4
    batch_size: int = 128
    learning_rate: float = 1e-3
    target_rate: float = 0.01
    reward_scale: float = 1.0
    check_every: int = 40
    check_episodes: int = 10


def learn(actor: TensorDictModuleBase, loss_module: LossModule, plan: Plan, seed: int) -> dict[str, Any]:
    """Collect with epsilon-greedy actions, learn from a replay buffer, keep the weights that acted best.

    Args:
        actor: greedy; it has the best weights in the end.
        loss_module: of the actor; it writes ``"loss"``.
        plan: how to learn.
        seed: of the environments.

    Returns:
        What a checkpoint tells of it: the mean return over 100 new episodes, frames, seed.
    """
    env = several(plan.env, plan.envs, seed).append_transform(RewardScaling(0.0, plan.reward_scale))
    greed = EGreedyModule(env.action_spec, eps_init=1.0, eps_end=0.05, annealing_num_steps=plan.frames // 4)
    collector = Collector(
        env,
        TensorDictSequential(actor, greed),
        frames_per_batch=plan.frames_per_batch,
        total_frames=plan.frames,
        auto_register_policy_transforms=False,
    )
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(plan.frames), batch_size=plan.batch_size)
    target = SoftUpdate(loss_module, tau=plan.target_rate)
    optimizer = torch.optim.Adam(loss_module.parameters(), lr=plan.learning_rate)
    batches = plan.frames // plan.frames_per_batch
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=batches)

    best, best_return = copy.deepcopy(actor.state_dict()), float("-inf")
    for batch, data in enumerate(collector, start=1):
        # Where two actions are worth the same, torchrl's distributional actor (0.14) marks both as taken.
        data["action"] = one_hot(data["action"].argmax(-1), data["action"].shape[-1])
        buffer.extend(data.reshape(-1))
        greed.step(data.numel())
        for _ in range(plan.frames_per_batch // plan.frames_per_update):
            loss = loss_module(buffer.sample())["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            target.step()
        schedule.step()
        if batch % plan.check_every == 0 or batch == batches:
            score = mean_return(plan.env, actor, plan.check_episodes, plan.steps, seed + 1)
            print(f"frames {len(buffer):6d}  loss {loss.item():.4f}  mean return {score:6.1f}", flush=True)
            if score >= best_return:
                best, best_return = copy.deepcopy(actor.state_dict()), score
    collector.shutdown()
    actor.load_state_dict(best)
    facts = {"environment": plan.env, "seed": seed, "frames": plan.frames, "episodes": 100}
    facts["mean return"] = mean_return(plan.env, actor, facts["episodes"], plan.steps, seed + 2)
    return facts
