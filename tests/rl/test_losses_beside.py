"""An explained policy stands beside the losses that train the policy."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from collected import ATTR, cartpole, deterministic, explain, gaussian, pendulum, q_actor
from tensordict.nn import TensorDictModule
from torch import nn

from tdhook import LRP, Target

pytest.importorskip("torchrl")

from torchrl.data import (
    Bounded,
)
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import (
    MLP,
    ActorValueOperator,
    OneHotCategorical,
    ProbabilisticActor,
    ValueOperator,
)
from torchrl.objectives import ClipPPOLoss, DDPGLoss, DQNLoss, REDQLoss, SACLoss, SoftUpdate, TD3Loss
from torchrl.objectives.value import GAE


def test_a_shared_trunk() -> None:
    trunk = TensorDictModule(nn.Sequential(nn.Linear(4, 16), nn.ReLU()), ["observation"], ["hidden"])
    head = ProbabilisticActor(
        TensorDictModule(nn.Linear(16, 2), ["hidden"], ["logits"]),
        in_keys=["logits"],
        distribution_class=OneHotCategorical,
    )
    both = ActorValueOperator(trunk, head, ValueOperator(nn.Linear(16, 1), in_keys=["hidden"]))
    acting = LRP("epsilon_plus", target=Target("logits", "action"), ledger=True)
    valuing = LRP("epsilon_plus", target="state_value", attribution_key="worth")
    batch = cartpole(seed=0).rollout(6, acting.wrap(both.get_policy_operator()))
    assert float(batch["ledger", "gap"].abs().max()) < 1e-4
    valuing.wrap(both.get_value_operator())(batch)
    assert batch[ATTR].shape == batch["worth", "observation"].shape == (6, 4)
    # Behind the trunk, as a head alone.
    head_alone = LRP("epsilon_plus", target="state_value").wrap(both.get_value_head())
    assert head_alone(batch.select("hidden"))["attr", "hidden"].shape == (6, 16)
    whole = LRP("epsilon_plus", target="state_value").wrap(both)
    torch.testing.assert_close(whole(batch.select("observation"))[ATTR], batch["worth", "observation"])


def q_value() -> ValueOperator:
    return ValueOperator(
        MLP(in_features=4, out_features=1, num_cells=[16]), in_keys=["observation", "action"]
    )


LOSSES: dict[str, Callable[[Any, Any], Any]] = {
    "sac": lambda actor, critic: SACLoss(actor, critic),
    "redq": lambda actor, critic: REDQLoss(actor, critic),
    "ddpg": lambda actor, critic: DDPGLoss(actor, critic),
    "td3": lambda actor, critic: TD3Loss(actor, critic, action_spec=Bounded(-2, 2, (1,))),
}


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_next_to_a_loss_whose_parameters_are_functional(name: str) -> None:
    of_gaussian = name in ("sac", "redq")
    actor, critic = (gaussian() if of_gaussian else deterministic()), q_value()
    method = LRP("epsilon_plus", target="loc" if of_gaussian else "action")
    explained, valued = method.wrap(actor), LRP("epsilon_plus", target="state_action_value").wrap(critic)
    loss = LOSSES[name](actor, critic)
    SoftUpdate(loss, tau=0.1)
    optimiser = torch.optim.SGD([p for p in loss.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        batch = pendulum().rollout(8, explained)
        torch.testing.assert_close(
            batch[ATTR], method.wrap(copy.deepcopy(actor))(batch.select("observation"))[ATTR]
        )
        before = copy.deepcopy(actor.state_dict())
        out = loss(batch.select("observation", "action", "next", "done", "terminated"))
        sum(value for key, value in out.items() if key.startswith("loss_")).backward()
        optimiser.step()
        optimiser.zero_grad()
        assert any(not torch.equal(value, before[key]) for key, value in actor.state_dict().items())
    # One of the critics whose parameters the loss keeps stacked.
    params = (loss.value_network_params if name == "ddpg" else loss.qvalue_network_params).data
    with (params[0] if params.batch_dims else params).to_module(critic):
        assert valued(batch.clone())["attr", "action"].shape == (8, 1)


def test_next_to_the_losses_of_a_q_network_and_of_an_actor_critic() -> None:
    actor = q_actor()
    loss = DQNLoss(actor, action_space="one-hot", delay_value=True)
    SoftUpdate(loss, tau=0.1)
    batch = cartpole(seed=0).rollout(10, explain(actor))
    loss(batch)["loss"].backward()
    assert all(p.grad is not None for p in loss.value_network_params.flatten_keys().values())
    plain = copy.deepcopy(actor)
    again = DQNLoss(plain, action_space="one-hot", delay_value=True)
    SoftUpdate(again, tau=0.1)
    torch.testing.assert_close(loss(batch)["loss"], again(batch.exclude("attr"))["loss"])

    actor, value = (
        gaussian(),
        ValueOperator(MLP(in_features=3, out_features=1, num_cells=[16]), ["observation"]),
    )
    ppo = ClipPPOLoss(actor, value)
    with set_exploration_type(ExplorationType.RANDOM):
        batch = pendulum().rollout(10, LRP("epsilon_plus", target="loc").wrap(actor))
    GAE(gamma=0.9, lmbda=0.9, value_network=value)(batch)
    out = ppo(batch)
    (out["loss_objective"] + out["loss_critic"]).backward()
    assert all(p.grad is not None for p in value.parameters())


def test_a_loss_takes_what_an_explained_actor_collected_and_the_actor_too() -> None:
    explained = explain(q_actor())
    batch = cartpole(seed=0).rollout(4, explained)
    assert not any(value.requires_grad for value in batch.values(True, True))
    loss = DQNLoss(explained, action_space="one-hot", delay_value=False)
    loss(batch)["loss"].backward()
    assert all(parameter.grad is not None for parameter in loss.parameters())
