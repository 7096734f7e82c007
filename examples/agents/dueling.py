"""A dueling network, learned by double DQN: a cart pole, its values split into the state's and advantages.

python examples/agents/dueling.py
"""

from __future__ import annotations

from typing import Any

import torch
from common import Shown, gap, main
from q_learning import Plan, learn
from torch import nn
from torchrl.data import OneHot
from torchrl.modules import QValueActor
from torchrl.modules.models import DuelingMlpDQNet
from torchrl.objectives import DQNLoss
from vectors import CART_POLE, shares

from tdhook import LRP, Target
from tdhook.plots import relevance_matrix
from tdhook.rl import make_env
from tdhook.targets import Advantage, Computed

ACTIONS = ("push left", "push right")
PLAN = Plan(env="CartPole-v1", steps=500, frames=20_480, check_every=20)


def network() -> QValueActor:
    """Untrained: values ``V + A - mean(A)`` of two actions (Wang et al. 2016, equation 9).

    The value ``V`` of the state and the advantages ``A`` have heads of their own.
    """
    net = DuelingMlpDQNet(
        out_features=2,
        mlp_kwargs_feature={
            "in_features": 4,
            "num_cells": [64],
            "out_features": 64,
            "activation_class": nn.ReLU,
        },
        mlp_kwargs_output={"in_features": 64, "num_cells": 32, "activation_class": nn.ReLU},
    )
    return QValueActor(net, in_keys=["observation"], spec=OneHot(2))


def train(seed: int) -> dict[str, Any]:
    """Double DQN."""
    actor = network()
    loss_module = DQNLoss(actor, loss_function="smooth_l1", double_dqn=True, action_space="one-hot")
    loss_module.make_value_estimator(gamma=0.99)
    facts = learn(actor, loss_module, PLAN, seed)
    return {"weights": actor.state_dict(), "facts": facts}


def explain(checkpoint: dict[str, Any], seed: int) -> Shown:
    """What the value of a state, and the advantage of each push where it was chosen, rest on."""
    actor = network()
    actor.load_state_dict(checkpoint["weights"])
    # The advantages of such a network have mean zero: the mean of Q is V.
    value = Computed(lambda outputs, inputs: outputs["action_value"].mean(-1, keepdim=True))
    why_this = LRP("attn_lrp", target=Advantage(index="action"), ledger=True).wrap(actor)
    rollout = make_env(PLAN.env, seed).rollout(PLAN.steps, why_this)
    advantage, taken = rollout["attr", "observation"], rollout["action"].argmax(-1)
    rows = {f"Q - V: {ACTIONS[i]}": advantage[taken == i] for i in sorted(set(taken.tolist()))}
    largest = gap(rollout)
    for name, target in {"Q": Target("action_value", "action"), "V": value}.items():
        explained = LRP("attn_lrp", target=target, ledger=True).wrap(actor)(rollout.select("observation"))
        rows = {name: explained["attr", "observation"], **rows}
        largest = max(largest, gap(explained))

    figure = relevance_matrix(
        torch.stack([relevance.mean(0) for relevance in rows.values()]),
        list(rows),
        CART_POLE,
        title="CartPole, dueling DQN: mean relevance for values and advantages",
    )
    lines = [f"episode: return {rollout['next', 'reward'].sum():.0f}, {len(rollout)} steps"]
    lines += [f"{name}, {len(part)} steps: {shares(part, CART_POLE)}" for name, part in rows.items()]
    return Shown(figure, largest, lines)


if __name__ == "__main__":
    main("dueling", train, explain)
