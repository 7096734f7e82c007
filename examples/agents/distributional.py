"""Two networks that predict the distribution of the return: by atoms (C51) and by quantiles (QR-DQN), on a cart pole.

python examples/agents/distributional.py
"""

from __future__ import annotations

from typing import Any

import torch
from common import Shown, gap, main
from q_learning import Plan, learn
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import Tensor, nn
from torchrl.data import OneHot
from torchrl.envs.utils import step_mdp
from torchrl.modules import MLP, DistributionalQValueActor, QValueModule
from torchrl.objectives import DistributionalDQNLoss, LossModule
from vectors import CART_POLE, shares, signs

from tdhook import LRP, Contrast, Target
from tdhook.plots import relevance_matrix
from tdhook.rl import make_env
from tdhook.targets import Atom, ExpectedValue

PLAN = Plan(env="CartPole-v1", steps=500, frames=25_600, learning_rate=2e-3, check_every=20)
DISCOUNT = 0.98
ATOMS, QUANTILES = 26, 16
LARGEST_RETURN = 50.0
"""Discounted, of an episode that never ends."""


def categorical_network() -> DistributionalQValueActor:
    """Untrained, by atoms (Bellemare et al. 2017).

    It writes their log-probabilities as ``action_value``, ``[*batch, atoms, actions]``.
    """
    return DistributionalQValueActor(
        MLP(in_features=4, out_features=(ATOMS, 2), num_cells=[64, 64], activation_class=nn.ReLU),
        support=torch.linspace(0.0, LARGEST_RETURN, ATOMS),
        in_keys=["observation"],
        spec=OneHot(2),
    )


def quantile_network() -> TensorDictSequential:
    """Untrained, by quantiles in the middle of equal shares of probability (Dabney et al. 2018).

    It writes ``quantiles``, ``[*batch, quantiles, actions]``, and their mean as ``action_value``.
    """
    net = MLP(in_features=4, out_features=(QUANTILES, 2), num_cells=[64, 64], activation_class=nn.ReLU)
    return TensorDictSequential(
        TensorDictModule(net, ["observation"], ["quantiles"]),
        TensorDictModule(lambda quantiles: quantiles.mean(-2), ["quantiles"], ["action_value"]),
        QValueModule(action_space="one-hot", spec=OneHot(2)),
    )


class QuantileLoss(LossModule):
    """Quantile regression with the Huber loss (Dabney et al. 2018, equation 10), and double Q-learning.

    Args:
        actor: see :func:`quantile_network`.
        gamma: discount.
    """

    def __init__(self, actor: TensorDictSequential, gamma: float) -> None:
        super().__init__()
        self.convert_to_functional(actor, "value_network", create_target_params=True)
        self.gamma = gamma

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """The loss of a batch of steps ``[steps]``."""
        now, after = tensordict.select("observation"), step_mdp(tensordict).select("observation")
        with self.value_network_params.to_module(self.value_network):
            predicted = self.value_network(now)["quantiles"]
        with torch.no_grad():
            with self.value_network_params.to_module(self.value_network):
                best = self.value_network(after)["action"]
            with self.target_value_network_params.to_module(self.value_network):
                follows = _of_action(self.value_network(after)["quantiles"], best)
        alive = (~tensordict["next", "terminated"]).float()
        wanted = tensordict["next", "reward"] + self.gamma * alive * follows
        predicted = _of_action(predicted, tensordict["action"])
        error = wanted.unsqueeze(-2) - predicted.unsqueeze(-1)  # [steps, predicted, wanted]
        huber = nn.functional.huber_loss(error, torch.zeros_like(error), reduction="none")
        middle = (torch.arange(QUANTILES) + 0.5) / QUANTILES
        weight = (middle.unsqueeze(-1) - (error.detach() < 0).float()).abs()
        return TensorDict({"loss": (weight * huber).mean(-1).sum(-1).mean()})


def _of_action(quantiles: Tensor, action: Tensor) -> Tensor:
    return (quantiles * action.unsqueeze(-2)).sum(-1)


def train(seed: int) -> dict[str, Any]:
    """First one, then the other."""
    atoms, quantiles = categorical_network(), quantile_network()
    about_atoms = learn(atoms, DistributionalDQNLoss(atoms, gamma=DISCOUNT), PLAN, seed)
    about_quantiles = learn(quantiles, QuantileLoss(quantiles, DISCOUNT), PLAN, seed)
    return {
        "weights": {"atoms": atoms.state_dict(), "quantiles": quantiles.state_dict()},
        "facts": {
            **about_atoms,
            "mean return": {"C51": about_atoms["mean return"], "QR-DQN": about_quantiles["mean return"]},
        },
    }


def explain(checkpoint: dict[str, Any], seed: int) -> Shown:
    """The expectation, and each atom and quantile of the return of the action taken."""
    c51, qr = categorical_network(), quantile_network()
    c51.load_state_dict(checkpoint["weights"]["atoms"])
    qr.load_state_dict(checkpoint["weights"]["quantiles"])
    expected = ExpectedValue(c51.support, index="action")
    policy = LRP("attn_lrp", target=expected, ledger=True).wrap(c51)
    rollout = make_env(PLAN.env, seed).rollout(PLAN.steps, policy)
    steps = rollout.select("observation")
    of_quantile = Atom("all", quantiles=True, action_value="quantiles")
    explained = {
        "C51, expectation": rollout,
        "C51, each atom": LRP("attn_lrp", target=Atom("all"), ledger=True).wrap(c51)(steps.copy()),
        "QR, why left": LRP(
            "attn_lrp",
            target=Contrast(Target("action_value", 0), Target("action_value", 1)),
            ledger=True,
        ).wrap(qr)(steps.copy()),
        "QR, each quantile": LRP("attn_lrp", target=of_quantile, ledger=True).wrap(qr)(steps.copy()),
    }
    lines = [f"episode: return {rollout['next', 'reward'].sum():.0f}, {len(rollout)} steps"]
    for name, td in explained.items():
        relevance = td["attr", "observation"]
        lines.append(f"{name}: {shares(relevance.reshape(-1, 4), CART_POLE)}")
    quantiles = explained["QR, each quantile"]["attr", "observation"].mean(0)
    lines += [f"quantile {i}: {signs(quantiles[i : i + 1], CART_POLE)}" for i in (0, QUANTILES - 1)]
    figure = relevance_matrix(
        quantiles,
        [f"{(i + 0.5) / QUANTILES:.0%}" for i in range(QUANTILES)],
        CART_POLE,
        title="CartPole, QR-DQN: mean relevance of each quantile of the return",
        row_label="quantile",
    )
    return Shown(figure, max(map(gap, explained.values())), lines)


if __name__ == "__main__":
    main("distributional", train, explain)
