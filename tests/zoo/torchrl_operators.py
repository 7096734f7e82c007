"""Actors with their critics, and policies of vision and language, of torchrl.modules."""

from __future__ import annotations

import torch
from tensordict import TensorDict
from tensordict.nn import ProbabilisticTensorDictModule
from tensordict.nn import TensorDictSequential as Seq
from torch import nn
from torchrl.modules import (
    MLP,
    Actor,
    ActorCriticOperator,
    ActorCriticWrapper,
    ActorValueOperator,
    IndependentNormal,
    LeRobotPolicyWrapper,
    MultiStepActorWrapper,
    NormalParamExtractor,
    ProbabilisticActor,
    TinyVLA,
    ValueOperator,
)

from tdhook import Target

from .cases import Collection, first, inputs, keyed, ready, settled

CASES = Collection()


def observation(**entries):
    return inputs(2, observation=(4,), **entries)


def gaussian():
    return nn.Sequential(MLP(4, 4, num_cells=[5]), NormalParamExtractor())


# --- Actors with critics --------------------------------------------------------------------------


def parts(value, *, critic_in):
    common = keyed(MLP(4, 3, num_cells=[5], activate_last_layer=True), ["observation"], ["hidden"])
    head = nn.Sequential(nn.Linear(3, 4), NormalParamExtractor())
    policy = ProbabilisticActor(
        keyed(head, ["hidden"], ["loc", "scale"]),
        in_keys=["loc", "scale"],
        distribution_class=IndependentNormal,
    )
    return common, policy, ValueOperator(MLP(out_features=1, num_cells=[5]), critic_in, [value])


for key in ("action", "state_value"):

    @CASES.add(f"ActorValueOperator, its {key}", "ActorValueOperator")
    def _(key=key):
        td = observation()
        model = ActorValueOperator(*parts("state_value", critic_in=["hidden"]))
        return settled(model, td), td, first(key)


@CASES.add("ActorValueOperator, its policy", "ActorValueOperator")
def _():
    td = observation()
    model = settled(ActorValueOperator(*parts("state_value", critic_in=["hidden"])), td)
    return model.get_policy_operator(), td, first("action")


@CASES.add("ActorCriticOperator", "ActorCriticOperator")
def _():
    td = observation()
    model = ActorCriticOperator(*parts("state_action_value", critic_in=["hidden", "action"]))
    return settled(model, td), td, first("state_action_value")


@CASES.add("ActorCriticWrapper", "ActorCriticWrapper")
def _():
    td = observation()
    actor = Actor(MLP(4, 2, num_cells=[5]))
    critic = ValueOperator(MLP(out_features=1, num_cells=[5]), ["observation"])
    return settled(ActorCriticWrapper(actor, critic), td), td, first("state_value")


@CASES.add("MultiStepActorWrapper", "MultiStepActorWrapper", in_keys=["observation"])
def _():
    actor = Actor(MLP(4, (3, 2), num_cells=[5]), out_keys=["action"])
    model = MultiStepActorWrapper(actor, n_steps=3)
    return ready(model), observation(is_init=torch.ones(2, 1).bool()), first("action")


# --- Vision, language, action ---------------------------------------------------------------------


def scene():
    td = inputs(2)
    td["observation"] = TensorDict(
        {"image": torch.rand(2, 3, 9, 9), "state": torch.rand(2, 4)}, batch_size=[2]
    )
    td["language_instruction"] = ["lift the cube", "push the cube"]
    return td


@CASES.add("TinyVLA", "TinyVLA", "VLAWrapperBase", tolerance=1e-4)
def _():
    # It computes in single precision whatever its inputs.
    td = scene()
    model = TinyVLA(action_dim=2, chunk_size=3, hidden_dim=6, text_dim=4, text_vocab=8)
    model(td.copy())
    return model.eval(), td, Target(("vla_action", "chunk"), (0, 0))


class Robot(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 2, 3, stride=2), nn.Linear(2 * 16 + 4, 6)

    def forward(self, batch):
        features = self.conv(batch["observation.images.image"]).relu().flatten(1)
        return self.head(torch.cat([features, batch["observation.state"]], -1)).unflatten(-1, (3, 2))


@CASES.add("LeRobotPolicyWrapper", "LeRobotPolicyWrapper", "VLAWrapperBase", tolerance=1e-4)
def _():
    model = LeRobotPolicyWrapper(Robot(), action_dim=2, chunk_size=3)
    return model.eval(), scene(), Target(("vla_action", "chunk"), (0, 0))


@CASES.add("Actor of what follows a distribution", "Actor")
def _():
    sample = ProbabilisticTensorDictModule(["loc", "scale"], ["latent"], distribution_class=IndependentNormal)
    model = Seq(
        keyed(gaussian(), ["observation"], ["loc", "scale"]),
        sample,
        keyed(MLP(2, 2, num_cells=[5]), ["latent"], ["action"]),
    )
    return ready(model), observation(), first("action")
