"""A deterministic policy and its critic, learned by TD3: a pendulum that is swung up and held there.

python examples/agents/td3.py
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from common import Shown, gap, main
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.collectors import Collector
from torchrl.data import Bounded, LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import RewardScaling
from torchrl.modules import MLP, AdditiveGaussianModule, TanhModule, ValueOperator
from torchrl.objectives import SoftUpdate, TD3Loss
from vectors import PENDULUM, mean_return, several, shares

from tdhook import LRP, Target
from tdhook.plots import relevance_over_time
from tdhook.rl import make_env

ENV, STEPS = "Pendulum-v1", 200
TORQUE = Bounded(-2.0, 2.0, (1,))
FRAMES, ENVS, FRAMES_PER_BATCH, FIRST_FRAMES = 16_000, 8, 64, 1_024
FRAMES_PER_UPDATE, UPDATES_PER_ACTOR_UPDATE, BATCH_SIZE = 2, 2, 128
LEARNING_RATE, DISCOUNT, TARGET_RATE = 2e-3, 0.98, 0.01


def networks() -> tuple[TensorDictSequential, ValueOperator]:
    """Both untrained: the policy, and the value of an observation and an action."""
    layers = MLP(in_features=3, out_features=1, num_cells=[64, 64], activation_class=nn.ReLU)
    actor = TensorDictSequential(
        TensorDictModule(layers, ["observation"], ["push"]),
        TanhModule(in_keys=["push"], out_keys=["action"], spec=TORQUE),
    )
    value = MLP(in_features=4, out_features=1, num_cells=[64, 64], activation_class=nn.ReLU)
    return actor, ValueOperator(value, in_keys=["observation", "action"])


def train(seed: int) -> dict[str, Any]:
    """Collect with noise on the actions, learn from a replay buffer, keep the weights that acted best."""
    actor, critic = networks()
    noise = AdditiveGaussianModule(
        TORQUE, sigma_init=0.5, sigma_end=0.2, annealing_num_steps=FRAMES, safe=True
    )
    collector = Collector(
        several(ENV, ENVS, seed).append_transform(RewardScaling(0.0, 0.1)),
        TensorDictSequential(actor, noise),
        frames_per_batch=FRAMES_PER_BATCH,
        total_frames=FRAMES,
        init_random_frames=FIRST_FRAMES,
        auto_register_policy_transforms=False,
    )
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(FRAMES), batch_size=BATCH_SIZE)
    loss_module = TD3Loss(actor, critic, action_spec=TORQUE, num_qvalue_nets=2, policy_noise=0.1)
    loss_module.make_value_estimator(gamma=DISCOUNT)
    target = SoftUpdate(loss_module, tau=TARGET_RATE)
    of_actor = torch.optim.Adam(loss_module.actor_network_params.flatten_keys().values(), lr=LEARNING_RATE)
    of_critic = torch.optim.Adam(loss_module.qvalue_network_params.flatten_keys().values(), lr=LEARNING_RATE)
    schedules = [
        torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=FRAMES // FRAMES_PER_BATCH)
        for optimizer in (of_actor, of_critic)
    ]

    best: dict[str, Any] = {}
    best_return = float("-inf")
    for batch, data in enumerate(collector, start=1):
        buffer.extend(data.reshape(-1))
        noise.step(data.numel())
        if len(buffer) > FIRST_FRAMES:
            for update in range(FRAMES_PER_BATCH // FRAMES_PER_UPDATE):
                sample = buffer.sample()
                _descend(of_critic, loss_module.value_loss(sample)[0])
                if update % UPDATES_PER_ACTOR_UPDATE == 0:
                    _descend(of_actor, loss_module.actor_loss(sample)[0])
                target.step()
        for schedule in schedules:
            schedule.step()
        if batch % 25 == 0:
            score = mean_return(ENV, actor, 10, STEPS, seed + 1)
            print(f"frames {len(buffer):6d}  mean return {score:7.1f}", flush=True)
            if score >= best_return:
                best_return = score
                first_critic = loss_module.qvalue_network_params[0].flatten_keys(".").detach().clone()
                best = {"actor": copy.deepcopy(actor.state_dict()), "critic": first_critic.to_dict()}
    collector.shutdown()
    actor.load_state_dict(best["actor"])
    facts = {"environment": ENV, "seed": seed, "frames": FRAMES, "episodes": 100}
    facts["mean return"] = mean_return(ENV, actor, facts["episodes"], STEPS, seed + 2)
    return {"weights": best, "facts": facts}


def _descend(optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def explain(checkpoint: dict[str, Any], seed: int) -> Shown:
    """What the action rests on, and what the critic's value of it does: the observation, and the action itself.

    Both against their mean in the episode.
    """
    actor, critic = networks()
    actor.load_state_dict(checkpoint["weights"]["actor"])
    critic.load_state_dict(checkpoint["weights"]["critic"])
    rollout = make_env(ENV, seed).rollout(STEPS, actor)
    rollout = LRP("attn_lrp", target=Target("action"), baseline="mean", ledger=True).wrap(actor)(rollout)
    judged = LRP("attn_lrp", target="state_action_value", baseline="mean", ledger=True).wrap(critic)(
        rollout.select("observation", "action")
    )
    relevance = torch.cat([judged["attr", "observation"], judged["attr", "action"]], dim=-1)
    seen = torch.cat([rollout["observation"], rollout["action"]], dim=-1)

    upright = rollout["observation"][:, 0] > 0.95
    names = (*PENDULUM, "action")
    lines = [f"episode: return {rollout['next', 'reward'].sum():.0f}, upright in {int(upright.sum())} steps"]
    for where, steps in {"swinging up": ~upright, "upright": upright}.items():
        lines.append(f"action, {where}: {shares(rollout['attr', 'observation'][steps], PENDULUM)}")
        lines.append(f"value, {where}: {shares(relevance[steps], names)}")
    figure = relevance_over_time(
        relevance,
        names,
        observation=seen,
        title="Pendulum, TD3: what the critic's value of an action rests on",
    )
    return Shown(figure, max(gap(rollout), gap(judged)), lines)


if __name__ == "__main__":
    main("td3", train, explain)
