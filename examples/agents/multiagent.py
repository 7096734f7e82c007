"""Two agents of VMAS, each of which knows only where the *other* should go: whose observation mattered?

    python examples/agents/multiagent.py

In ``simple_reference`` an agent sees the three landmarks and the colour of the one that its partner has to reach. Two
set-ups of torchrl's ``MultiAgentMLP`` learn it by PPO, both with one critic for the team that sees everything: networks
of their own that read the observations of both agents, and one shared network that reads an agent's own observation.

What the two have learned in some minutes is worth the same, though only the first could know where to go, and relevance
says why: hardly any of it lies on the goals. The agents go to the middle of the landmarks, which beats chance.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from typing import Any

import torch
from common import Shown, gap, main
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import NormalParamExtractor, TensorDictModule
from torch import Tensor, nn
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.data.replay_buffers.samplers import SamplerWithoutReplacement
from torchrl.envs import EnvBase, RewardScaling, TransformedEnv, VmasEnv
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import MultiAgentMLP, ProbabilisticActor, TanhNormal, ValueOperator
from torchrl.objectives import ClipPPOLoss

from tdhook import LRP, Target, preset
from tdhook.plots import relevance_matrix

AGENTS, FEATURES, ACTIONS = 2, 21, 12
LEAST, MOST = torch.tensor([-1.0] * 2 + [0.0] * 10), torch.ones(ACTIONS)
"""An action is a force in x and in y, and a message of ten numbers."""

OBSERVATION, STATE_VALUE = ("agents", "observation"), ("agents", "state_value")
PARTS = {
    "velocity": slice(0, 2),
    "landmarks": slice(2, 8),
    "partner's goal": slice(8, 11),
    "message heard": slice(11, 21),
}
EPISODE = 30
WORLDS, EPISODES_PER_BATCH = 96, 8  # all worlds have the same goals between two resets
BATCHES, EPOCHS, MINIBATCH = 120, 5, 3840
RATE, DISCOUNT, TRACE = 1.5e-3, 0.95, 0.9
BATCHES_PER_CHECK = 10


@dataclass(frozen=True)
class Setup:
    """How the two agents are controlled.

    Attributes:
        together: each reads the observations of both.
        shared: they have one network.
    """

    together: bool
    shared: bool


SETUPS = {
    "own networks, see all": Setup(together=True, shared=False),
    "shared network, sees its own": Setup(together=False, shared=True),
}


def make_env(count: int, seed: int) -> EnvBase:
    """Several worlds at once. All of them have the goals of the last reset."""
    return VmasEnv("simple_reference", num_envs=count, continuous_actions=True, max_steps=EPISODE, seed=seed)


def make_actor(setup: Setup) -> ProbabilisticActor:
    """Untrained: reads ``("agents", "observation")`` and writes ``loc``, ``scale`` and ``action`` beside it."""
    net = MultiAgentMLP(
        n_agent_inputs=FEATURES,
        n_agent_outputs=2 * ACTIONS,
        n_agents=AGENTS,
        centralized=setup.together,
        share_params=setup.shared,
        depth=2,
        num_cells=64,
        activation_class=nn.ReLU,
    )
    parameters = [("agents", "loc"), ("agents", "scale")]
    return ProbabilisticActor(
        TensorDictModule(nn.Sequential(net, NormalParamExtractor()), [OBSERVATION], parameters),
        in_keys=parameters,
        out_keys=[("agents", "action")],
        distribution_class=TanhNormal,
        distribution_kwargs={"low": LEAST, "high": MOST},
        return_log_prob=True,
    )


def make_critic() -> ValueOperator:
    """Untrained: one network that sees the observations of both, and gives both the same value."""
    net = MultiAgentMLP(
        n_agent_inputs=FEATURES,
        n_agent_outputs=1,
        n_agents=AGENTS,
        centralized=True,
        share_params=True,
        depth=2,
        num_cells=64,
        activation_class=nn.ReLU,
    )
    return ValueOperator(net, in_keys=[OBSERVATION], out_keys=[STATE_VALUE])


def train(seed: int) -> dict[str, Any]:
    """PPO for each set-up."""
    weights, facts = {}, {"random return": round(mean_return(None, seed + 1), 1)}
    for name, setup in SETUPS.items():
        torch.manual_seed(seed)
        actor, critic = make_actor(setup), make_critic()
        learn(actor, critic, seed)
        weights[name] = {"actor": actor.state_dict(), "critic": critic.state_dict()}
        facts[f"mean return, {name}"] = round(mean_return(actor, seed + 1), 1)
    facts["frames each"] = BATCHES * WORLDS * EPISODES_PER_BATCH * EPISODE
    return {"weights": weights, "facts": {"seed": seed, **facts}}


def learn(actor: ProbabilisticActor, critic: ValueOperator, seed: int) -> None:
    """Train in place; the weights that acted best are kept."""
    env = TransformedEnv(make_env(WORLDS, seed), RewardScaling(0.0, 0.2, in_keys=[("agents", "reward")]))
    frames = WORLDS * EPISODES_PER_BATCH * EPISODE
    collector = Collector(
        env,
        actor,
        frames_per_batch=frames,
        total_frames=BATCHES * frames,
        auto_register_policy_transforms=False,
    )
    normalised: dict[str, Any] = {"normalize_advantage": True, "normalize_advantage_exclude_dims": (-2,)}
    loss_module = ClipPPOLoss(actor, critic, clip_epsilon=0.2, entropy_coeff=0.0, **normalised)
    loss_module.set_keys(
        reward=("agents", "reward"),
        action=("agents", "action"),
        value=STATE_VALUE,
        done=("agents", "done"),
        terminated=("agents", "terminated"),
        sample_log_prob=("agents", "action_log_prob"),
    )
    loss_module.make_value_estimator(gamma=DISCOUNT, lmbda=TRACE)
    optimizer = torch.optim.Adam(loss_module.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=BATCHES)
    buffer = TensorDictReplayBuffer(
        storage=LazyTensorStorage(frames), sampler=SamplerWithoutReplacement(), batch_size=MINIBATCH
    )
    best, best_return, start = (
        copy.deepcopy([actor.state_dict(), critic.state_dict()]),
        float("-inf"),
        time.time(),
    )
    for batch, data in enumerate(collector, start=1):
        for flag in ("done", "terminated"):  # of the world; the rewards are of agents
            data["next", "agents", flag] = data["next", flag].unsqueeze(-1).expand(*data.shape, AGENTS, 1)
        with torch.no_grad():
            loss_module.value_estimator(data)
        buffer.empty()
        buffer.extend(data.flatten())
        for _ in range(EPOCHS):
            for sample in buffer:
                losses = loss_module(sample)
                loss = losses["loss_objective"] + losses["loss_critic"]
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(loss_module.parameters(), 1.0)
                optimizer.step()
        schedule.step()
        if batch % BATCHES_PER_CHECK == 0:
            score = mean_return(actor, seed + 2)
            if score >= best_return:
                best, best_return = copy.deepcopy([actor.state_dict(), critic.state_dict()]), score
            print(f"batch {batch}  mean return {score:.1f}  {time.time() - start:.0f} s", flush=True)
    collector.shutdown()
    actor.load_state_dict(best[0])
    critic.load_state_dict(best[1])


def play(actor: ProbabilisticActor | None, seed: int, worlds: int = 16, resets: int = 9) -> TensorDict:
    """Whole episodes, ``[worlds * resets, EPISODE]``, in which the agents do what they hold best, or anything."""
    env = make_env(worlds, seed)
    with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
        return torch.cat([env.rollout(EPISODE, actor) for _ in range(resets)])


def mean_return(actor: ProbabilisticActor | None, seed: int) -> float:
    """Mean undiscounted return of the team."""
    state = torch.get_rng_state()
    torch.manual_seed(seed)  # VMAS draws its worlds from the global generator
    rewards = play(actor, seed)["next", "agents", "reward"]
    torch.set_rng_state(state)
    return rewards[..., 0, 0].sum(1).mean().item()


def shares(relevance: Tensor) -> Tensor:
    """Of all relevance, what each part of each observation has, ``[AGENTS * parts]``.

    Args:
        relevance: ``[..., AGENTS, FEATURES]``.
    """
    each = torch.stack([relevance[..., part].abs().sum(-1) for part in PARTS.values()], -1)
    mean = each.flatten(0, -3).mean(0).flatten()
    return mean / mean.sum()


def explain(checkpoint: dict[str, Any], seed: int) -> Shown:
    """Explain the movements of each agent, and the value of the team."""
    rows, names, gaps, lines = [], [], [], []
    for name, setup in SETUPS.items():
        actor, critic = make_actor(setup), make_critic()
        actor.load_state_dict(checkpoint["weights"][name]["actor"])
        critic.load_state_dict(checkpoint["weights"][name]["critic"])
        episodes = play(actor, seed, resets=4)
        lines.append(
            f"return here, {name}: {episodes['next', 'agents', 'reward'][..., 0, 0].sum(1).mean():.1f}"
        )
        for agent in range(AGENTS):
            move = Target(("agents", "loc"), [(agent, 0), (agent, 1)])  # the force in x, and in y
            moved = _explained(actor, move, episodes)
            rows.append(shares(moved["attr", "agents", "observation"]))
            gaps.append(gap(moved))
            names.append(f"{name}: agent {agent} moves")
        valued = _explained(critic, Target(STATE_VALUE, (0, 0)), episodes)
        rows.append(shares(valued["attr", "agents", "observation"]))
        gaps.append(gap(valued))
        names.append(f"{name}: value")
    matrix = torch.stack(rows)
    for label, row in zip(names, matrix.unflatten(1, (AGENTS, -1)), strict=True):
        by_agent = ", ".join(f"agent {i} {share:.0%}" for i, share in enumerate(row.sum(-1).tolist()))
        goals = ", ".join(f"{share:.0%}" for share in row[:, 2].tolist())
        lines.append(f"{label}: relevance on the observation of {by_agent}; on the goals told there {goals}")
    columns = [f"agent {i}: {part}" for i in range(AGENTS) for part in PARTS]
    figure = relevance_matrix(
        matrix,
        names,
        columns,
        title="VMAS simple_reference: whose observation mattered (share of absolute relevance)",
        row_label="explained",
        column_label="observation",
    )
    return Shown(figure, max(gaps), lines)


def _explained(module: TensorDictModule, target: Target, episodes: TensorDictBase) -> TensorDictBase:
    # Values near zero are sums of large parts that cancel; a larger epsilon keeps these from growing on the way back.
    explained = LRP(preset("epsilon", epsilon=1e-3), target=target, ledger=True).wrap(module)
    return explained(episodes.select(OBSERVATION))


if __name__ == "__main__":
    main("multiagent", train, explain)
