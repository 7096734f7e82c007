"""Losses and value estimators that are given explained networks: they do what they do with the networks themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import NormalParamExtractor, TensorDictModule
from torch import Tensor, nn

from tdhook import LRP, Target

pytest.importorskip("torchrl")

from torchrl.collectors import Collector
from torchrl.data import Bounded, Categorical
from torchrl.envs import GymEnv
from torchrl.modules import ProbabilisticActor, QValueActor, TanhNormal, ValueOperator
from torchrl.objectives import (
    A2CLoss,
    ClipPPOLoss,
    DDPGLoss,
    DQNLoss,
    IQLLoss,
    PPOLoss,
    ReinforceLoss,
    SACLoss,
    SoftUpdate,
    TD3Loss,
)
from torchrl.objectives.value import GAE, TD0Estimator, TDLambdaEstimator, VTrace


def actor() -> Any:
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2), NormalParamExtractor())
    module = TensorDictModule(net, ["observation"], ["loc", "scale"])
    return ProbabilisticActor(
        module, in_keys=["loc", "scale"], distribution_class=TanhNormal, return_log_prob=True
    )


def deterministic() -> Any:
    return TensorDictModule(
        nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1)), ["observation"], ["action"]
    )


def critic() -> Any:
    return ValueOperator(nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)), in_keys=["observation"])


class Q(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        return self.layer(torch.cat([observation, action], -1))


def q_critic() -> Any:
    return ValueOperator(Q(), in_keys=["observation", "action"])


def q_actor() -> Any:
    net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    return QValueActor(net, in_keys=["observation"], spec=Categorical(2))


def batch(policy: Any) -> TensorDict:
    torch.manual_seed(1)
    no = torch.zeros(6, 1, dtype=torch.bool)
    after = {
        "observation": torch.randn(6, 3),
        "reward": torch.randn(6, 1),
        "done": no,
        "terminated": no.clone(),
    }
    td = TensorDict({"observation": torch.randn(6, 3), "next": after}, [6])
    with torch.no_grad():
        return policy(td)


def itself(module: Any, key: Any) -> Any:
    return module


def explained(module: Any, key: Any) -> Any:
    return LRP("epsilon_plus", target=key).wrap(module)


Make = Callable[[Any, Any], Any]
STAYS: Any = {"auto_register_policy_transforms": False}
SPEC = Bounded(-1, 1, (1,))


def with_advantage(loss: type) -> Callable[[Make], tuple[Any, TensorDict]]:
    def make(wrap: Make) -> tuple[Any, TensorDict]:
        policy, value = actor(), critic()
        td = batch(policy)
        value = wrap(value, "state_value")
        GAE(gamma=0.9, lmbda=0.9, value_network=value)(td)
        return loss(wrap(policy, "loc"), value), td

    return make


def with_q(loss: type, policy: Any, key: str, **options: Any) -> Callable[[Make], tuple[Any, TensorDict]]:
    def make(wrap: Make) -> tuple[Any, TensorDict]:
        made = policy()
        more = {"value_network": wrap(critic(), "state_value")} if loss is IQLLoss else options
        return loss(wrap(made, key), wrap(q_critic(), "state_action_value"), **more), batch(made)

    return make


def of_dqn(wrap: Make) -> tuple[Any, TensorDict]:
    made = q_actor()
    return DQNLoss(
        wrap(made, Target("action_value", 0)), action_space="categorical", delay_value=True
    ), batch(made)


LOSSES = {
    **{loss.__name__: with_advantage(loss) for loss in (ClipPPOLoss, PPOLoss, A2CLoss, ReinforceLoss)},
    "SAC": with_q(SACLoss, actor, "loc", action_spec=SPEC),
    "TD3": with_q(TD3Loss, deterministic, "action", action_spec=SPEC),
    "DDPG": with_q(DDPGLoss, deterministic, "action", delay_value=True),
    "IQL": with_q(IQLLoss, actor, "loc"),
    "DQN": of_dqn,
}


WITH_TARGETS = ("SAC", "TD3", "DDPG", "IQL", "DQN")


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_trains_explained_networks_as_the_networks_themselves(name: str) -> None:
    terms, gradients = [], []
    for wrap in (itself, explained):
        torch.manual_seed(0)
        loss, td = LOSSES[name](wrap)
        updates = SoftUpdate(loss, eps=0.5) if name in WITH_TARGETS else None
        found = loss(td)
        sum(value for key, value in found.items() if key.startswith("loss")).backward()
        terms.append(found.detach())
        gradients.append([p.grad for p in loss.parameters()])
        if updates is not None:
            updates.step()
    torch.testing.assert_close(terms[1].to_dict(), terms[0].to_dict())
    assert len(gradients[0]) == len(gradients[1]) and all(g is not None for g in gradients[1])
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("estimator", [GAE, TDLambdaEstimator, TD0Estimator, VTrace])
def test_a_value_estimator_reads_an_explained_critic(estimator: Any) -> None:
    advantages = []
    for wrap in (itself, explained):
        torch.manual_seed(0)
        policy, options = actor(), {} if estimator in (TD0Estimator, VTrace) else {"lmbda": 0.9}
        if estimator is VTrace:
            options["actor_network"] = wrap(policy, "loc")
        td = batch(policy).unsqueeze(0)
        estimator(gamma=0.9, value_network=wrap(critic(), "state_value"), **options)(td)
        advantages.append(td["advantage"])
        assert "attr" not in td.keys()
    torch.testing.assert_close(advantages[1], advantages[0])


def test_a_collector_acts_with_an_explained_policy_of_the_weights_of_the_moment() -> None:
    torch.manual_seed(0)
    policy = actor()
    collector = Collector(
        GymEnv("Pendulum-v1"), explained(policy, "loc"), frames_per_batch=4, total_frames=8, **STAYS
    )
    for data in collector:
        expected = explained(policy, "loc")(data.select("observation"))["attr", "observation"]
        torch.testing.assert_close(data["attr", "observation"], expected)
        with torch.no_grad():
            next(policy.parameters()).mul_(1.5)
        collector.update_policy_weights_()
    collector.shutdown()


def test_a_transform_of_functions_is_refused() -> None:
    module = explained(critic(), "state_value")
    with pytest.raises(NotImplementedError, match="call it on the whole batch, outside of them"):
        torch.vmap(lambda x: module(TensorDict({"observation": x}, []))["state_value"])(torch.randn(4, 3))
