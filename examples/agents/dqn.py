"""A deep Q-network, double DQN: a two-link robot arm that swings itself up with one motor, in its elbow.

python examples/agents/dqn.py
"""

from __future__ import annotations

from typing import Any

from common import Shown, gap, main
from q_learning import Plan, learn
from torch import nn
from torchrl.data import OneHot
from torchrl.modules import MLP, QValueActor
from torchrl.objectives import DQNLoss
from vectors import ACROBOT, shares, signs

from tdhook import LRP, Contrast, Target
from tdhook.plots import relevance_over_time
from tdhook.rl import make_env

TORQUES = ("back", "not", "forth")
PLAN = Plan(env="Acrobot-v1", steps=500, frames=51_200, reward_scale=0.1)


def network() -> QValueActor:
    """Untrained: it writes an ``action_value`` for each of three torques, and takes the best."""
    net = MLP(in_features=6, out_features=3, num_cells=[64, 64], activation_class=nn.ReLU)
    return QValueActor(net, in_keys=["observation"], spec=OneHot(3))


def train(seed: int) -> dict[str, Any]:
    """Double DQN."""
    actor = network()
    loss_module = DQNLoss(actor, loss_function="smooth_l1", double_dqn=True, action_space="one-hot")
    loss_module.make_value_estimator(gamma=0.99)
    facts = learn(actor, loss_module, PLAN, seed)
    return {"weights": actor.state_dict(), "facts": facts}


def explain(checkpoint: dict[str, Any], seed: int) -> Shown:
    """Why it pushed one way and not the other, at each step of an episode, against the mean of the episode."""
    actor = network()
    actor.load_state_dict(checkpoint["weights"])
    why_forth = Contrast(Target("action_value", 2), Target("action_value", 0))
    rollout = make_env(PLAN.env, seed).rollout(PLAN.steps, actor)
    rollout = LRP("attn_lrp", target=why_forth, baseline="mean", ledger=True).wrap(actor)(rollout)

    relevance, taken = rollout["attr", "observation"], rollout["action"].argmax(-1)
    figure = relevance_over_time(
        relevance,
        ACROBOT,
        taken,
        TORQUES,
        rollout["observation"],
        title="Acrobot, DQN: why it pushes forth (red), and not back (blue)",
    )
    lines = [f"episode: return {rollout['next', 'reward'].sum():.0f}, {len(rollout)} steps"]
    lines.append(f"share of relevance: {shares(relevance, ACROBOT)}")
    lines += [
        f"pushed {TORQUES[i]} {int((taken == i).sum())} times: {signs(relevance[taken == i], ACROBOT)}"
        for i in sorted(set(taken.tolist()))
    ]
    return Shown(figure, gap(rollout), lines)


if __name__ == "__main__":
    main("dqn", train, explain)
