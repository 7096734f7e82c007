"""Train the policy that tdhook's demonstration explains: a double DQN with five-step returns for CartPole-v1.

    python examples/train_cartpole.py --out cartpole_dqn.pt

Takes five to ten minutes on one CPU core and needs the extra ``rl`` (torchrl, gymnasium). The checkpoint in
``src/tdhook/rl/checkpoints`` is what this script writes with its default seed and frames; other processors round
differently, so that the same seed can lead to other weights there.
"""

import argparse
import copy
import time
from pathlib import Path

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, MultiStep, TensorDictReplayBuffer
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import EGreedyModule
from torchrl.objectives import DQNLoss, SoftUpdate

from tdhook.rl import Policy, build_actor, make_env, save_policy

ENV = "CartPole-v1"
FEATURES = ("cart position", "cart velocity", "pole angle", "pole angular velocity")
ACTIONS = ("push left", "push right")
ARCHITECTURE = {"in_features": 4, "out_features": 2, "num_cells": [64, 64], "activation": "ReLU"}
SOLVED = 475.0

FRAMES_PER_BATCH, UPDATES_PER_BATCH = 250, 125
BATCH_SIZE = 64
LEARNING_RATE = 3e-3
DISCOUNT = 0.99
RETURN_STEPS = 5
TARGET_RATE = 0.02
BATCHES_PER_CHECK = 20
CHECK_EPISODES, FINAL_EPISODES = 10, 100


def train(seed: int, frames: int) -> TensorDictModule:
    """Collect with epsilon-greedy actions, learn from a replay buffer, keep the weights that acted best."""
    torch.manual_seed(seed)
    env = make_env(ENV, seed)
    actor = build_actor("dqn_mlp", ARCHITECTURE)
    explore = EGreedyModule(env.action_spec, eps_init=1.0, eps_end=0.05, annealing_num_steps=frames // 5)
    collector = Collector(
        env,
        TensorDictSequential(actor, explore),
        frames_per_batch=FRAMES_PER_BATCH,
        total_frames=frames,
        auto_register_policy_transforms=False,  # for recurrent policies; unset, torchrl 0.14 warns
    )
    everything = LazyTensorStorage(frames + FRAMES_PER_BATCH)
    buffer = TensorDictReplayBuffer(storage=everything, batch_size=BATCH_SIZE)
    loss_module = DQNLoss(actor, loss_function="smooth_l1", double_dqn=True, action_space=env.action_spec)
    loss_module.make_value_estimator(gamma=DISCOUNT)
    target = SoftUpdate(loss_module, tau=TARGET_RATE)
    optimizer = torch.optim.Adam(loss_module.parameters(), lr=LEARNING_RATE)
    # Q-learning drifts as it goes on; a rate that falls to zero lets the last weights settle.
    batches = -(-frames // FRAMES_PER_BATCH)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=batches)

    best, best_return, start = copy.deepcopy(actor.state_dict()), float("-inf"), time.perf_counter()
    for batch, data in enumerate(collector, start=1):
        buffer.extend(several_steps(data))
        explore.step(data.numel())
        for _ in range(UPDATES_PER_BATCH):
            loss = loss_module(buffer.sample())["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            target.step()
        schedule.step()
        if batch % BATCHES_PER_CHECK == 0:
            score = evaluate(actor, CHECK_EPISODES, seed + 1)
            if score >= best_return:
                best, best_return = copy.deepcopy(actor.state_dict()), score
            print(
                f"frames {len(buffer):6d}  epsilon {explore.eps.item():.2f}  loss {loss.item():.4f}  "
                f"mean return {score:6.1f}  {time.perf_counter() - start:4.0f} s",
                flush=True,
            )
    collector.shutdown()
    actor.load_state_dict(best)
    return actor


def several_steps(data: TensorDict) -> TensorDict:
    """Discounted rewards of the next few steps, and the observation after them: news of a fall travels faster.

    MultiStep moves the next observation ahead but leaves ``terminated`` where it was (torchrl 0.14), and the steps
    just before a fall would be valued by a state after it. So the flag is moved along here.
    """
    moved = MultiStep(gamma=DISCOUNT, n_steps=RETURN_STEPS)(data)
    last = torch.arange(len(data)) + moved["steps_to_next_obs"] - 1
    moved["next", "terminated"] = data["next", "terminated"][last]
    return moved


@torch.no_grad()
def evaluate(actor: TensorDictModule, episodes: int, seed: int) -> float:
    """Mean return over whole episodes of greedy actions."""
    env = make_env(ENV, seed)
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        # An episode ends by itself, after 500 steps at most.
        returns = [env.rollout(1_000, actor)["next", "reward"].sum() for _ in range(episodes)]
    return torch.stack(returns).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a double DQN for CartPole-v1 with torchrl.")
    parser.add_argument("--seed", type=int, default=0, help="of every random number (default: %(default)s)")
    parser.add_argument(
        "--frames", type=int, default=60_000, help="steps to learn from (default: %(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, default="cartpole_dqn.pt", help="checkpoint (default: %(default)s)"
    )
    arguments = parser.parse_args()

    torch.set_num_threads(1)  # the network is too small to gain from more
    actor = train(arguments.seed, arguments.frames)
    mean_return = evaluate(actor, FINAL_EPISODES, arguments.seed + 2)
    metadata = {
        "kind": "dqn_mlp",
        "architecture": ARCHITECTURE,
        "seed": arguments.seed,
        "frames": arguments.frames,
        "evaluation": {"episodes": FINAL_EPISODES, "mean_return": mean_return},
    }
    save_policy(Policy(actor, ENV, FEATURES, ACTIONS, metadata), arguments.out)
    print(f"mean return over {FINAL_EPISODES} greedy episodes: {mean_return:.1f} (solved: {SOLVED:.0f})")
    print(f"wrote {arguments.out} ({arguments.out.stat().st_size / 1e3:.0f} kB)")


if __name__ == "__main__":
    main()
