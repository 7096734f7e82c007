"""A categorical actor and its critic, learned by PPO: a lander that fires one of its engines, or none.

python examples/agents/ppo.py
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from common import Shown, gap, main
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictSequential
from tensordict.utils import NestedKey
from torch import nn
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, OneHot, SamplerWithoutReplacement, TensorDictReplayBuffer
from torchrl.envs import RewardScaling
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import MLP, OneHotCategorical, ProbabilisticActor, ValueOperator
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE
from vectors import LANDER, mean_return, several, shares, signs

from tdhook import LRP, Contrast, Key, Target
from tdhook.plots import relevance_over_time
from tdhook.rl import make_env
from tdhook.targets import Computed, Entropy, LogProb

ENV, STEPS = "LunarLander-v3", 1000
ENGINES = ("none", "left engine", "main engine", "right engine")
POINTS = 10.0
"""Of the game, in a unit of the critic's value."""

FRAMES, ENVS, FRAMES_PER_BATCH = 600_064, 16, 2_048
EPOCHS, MINIBATCH = 6, 256
LEARNING_RATE, DISCOUNT, LAMBDA = 1e-3, 0.99, 0.95
ENTROPY = 0.01


def networks() -> tuple[ProbabilisticActor, ValueOperator]:
    """Both untrained: the policy, and the value of a state."""
    policy = MLP(in_features=8, out_features=4, num_cells=[64, 64], activation_class=nn.Tanh)
    actor = ProbabilisticActor(
        TensorDictModule(policy, ["observation"], ["logits"]),
        in_keys=["logits"],
        spec=OneHot(4),
        distribution_class=OneHotCategorical,
        return_log_prob=True,
    )
    value = MLP(in_features=8, out_features=1, num_cells=[64, 64], activation_class=nn.Tanh)
    return actor, ValueOperator(value, in_keys=["observation"])


def train(seed: int) -> dict[str, Any]:
    """Collect with the policy as it is, learn from each batch a few times, keep the weights that acted best."""
    actor, critic = networks()
    env = several(ENV, ENVS, seed).append_transform(RewardScaling(0.0, 1.0 / POINTS))
    collector = Collector(
        env,
        actor,
        frames_per_batch=FRAMES_PER_BATCH,
        total_frames=FRAMES,
        auto_register_policy_transforms=False,
    )
    buffer = TensorDictReplayBuffer(
        storage=LazyTensorStorage(FRAMES_PER_BATCH),
        sampler=SamplerWithoutReplacement(),
        batch_size=MINIBATCH,
    )
    advantage = GAE(gamma=DISCOUNT, lmbda=LAMBDA, value_network=critic, average_gae=True)
    loss_module = ClipPPOLoss(actor, critic, clip_epsilon=0.2, entropy_coeff=ENTROPY, critic_coeff=0.5)
    optimizer = torch.optim.Adam(loss_module.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=FRAMES // FRAMES_PER_BATCH)

    best: dict[str, Any] = {}
    best_return = float("-inf")
    for batch, data in enumerate(collector, start=1):
        for _ in range(EPOCHS):
            with torch.no_grad():
                advantage(data)
            buffer.extend(data.reshape(-1))
            for _ in range(FRAMES_PER_BATCH // MINIBATCH):
                losses = loss_module(buffer.sample())
                optimizer.zero_grad()
                sum(value for key, value in losses.items() if key.startswith("loss_")).backward()
                nn.utils.clip_grad_norm_(loss_module.parameters(), 0.5)
                optimizer.step()
        schedule.step()
        if batch % 20 == 0:
            score = mean_return(ENV, actor, 10, STEPS, seed + 1)
            print(f"frames {batch * FRAMES_PER_BATCH:6d}  mean return {score:6.1f}", flush=True)
            if score >= best_return:
                best_return = score
                best = copy.deepcopy({"actor": actor.state_dict(), "critic": critic.state_dict()})
    collector.shutdown()
    actor.load_state_dict(best["actor"])
    facts = {"environment": ENV, "seed": seed, "frames": FRAMES, "episodes": 100}
    facts["mean return"] = mean_return(ENV, actor, facts["episodes"], STEPS, seed + 2)
    return {"weights": best, "facts": facts}


_OF_A_STEP: list[NestedKey] = [("next", "reward"), ("next", "terminated")]


def step_of(critic: ValueOperator) -> TensorDictSequential:
    """The critic before a step, and, as ``next_value``, after it."""
    after = TensorDictModule(critic.module, [("next", "observation")], ["next_value"])
    return TensorDictSequential(critic, after)


def one_step_advantage(outputs: TensorDictBase, inputs: TensorDictBase) -> torch.Tensor:
    """``r + gamma V(s') - V(s)``: by how much a step turned out better than the critic thought."""
    alive = 1.0 - inputs["next", "terminated"].float()
    after = inputs["next", "reward"] / POINTS + DISCOUNT * alive * outputs["next_value"]
    return after - outputs["state_value"]


def explain(checkpoint: dict[str, Any], seed: int) -> Shown:
    """Why the main engine, and not none, at each step of a landing; and what else the two networks say rests on."""
    actor, critic = networks()
    actor.load_state_dict(checkpoint["weights"]["actor"])
    critic.load_state_dict(checkpoint["weights"]["critic"])
    why_main = Contrast(Target("logits", ENGINES.index("main engine")), Target("logits", 0))
    policy = LRP("attn_lrp", target=why_main, ledger=True).wrap(actor)
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        rollout = make_env(ENV, seed).rollout(STEPS, policy)
    rollout["taken"] = rollout["action"]  # an explained policy acts, and writes its action
    relevance, taken = rollout["attr", "observation"], rollout["action"].argmax(-1)
    main_engine = taken == ENGINES.index("main engine")

    lines = [f"episode: return {rollout['next', 'reward'].sum():.0f}, {len(rollout)} steps"]
    lines += [
        f"main engine and not none, share of relevance: {shares(relevance, LANDER)}",
        f"mean where it was on: {signs(relevance[main_engine], LANDER)}",
        f"mean where it was off: {signs(relevance[~main_engine], LANDER)}",
    ]
    largest = gap(rollout)
    steps = rollout.select("observation", "taken", "next")
    # An advantage is a small difference of large values, of which single precision leaves three digits.
    before_and_after = step_of(copy.deepcopy(critic).double())
    advantage = Computed(one_step_advantage, entries_read=_OF_A_STEP)
    for name, module, target, given in (
        ("logit of the engine", actor, Target("logits", Key("taken")), steps),
        ("log-probability of the engine", actor, LogProb("logits", Key("taken")), steps),
        ("entropy", actor, Entropy("logits"), steps),
        ("value of the state", critic, Target("state_value"), steps),
        ("advantage of the step", before_and_after, advantage, steps.double()),
    ):
        explained = LRP("attn_lrp", target=target, ledger=True).wrap(module)(given.copy())
        attr = explained["attr"]
        of_features = attr["observation"] + attr.get(("next", "observation"), 0.0)
        lines.append(f"{name}: {shares(of_features, LANDER)}")
        largest = max(largest, gap(explained))
    figure = relevance_over_time(
        relevance,
        LANDER,
        taken,
        ENGINES,
        rollout["observation"],
        title="Lander, PPO: what speaks for the main engine (red), and for none (blue)",
    )
    return Shown(figure, largest, lines)


if __name__ == "__main__":
    main("ppo", train, explain)
