"""Networks of torchrl.modules inside the modules that users put them in."""

from __future__ import annotations

import torch
from tensordict.nn import TensorDictSequential as Seq
from torch import nn
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import (
    MLP,
    Actor,
    BatchRenorm1d,
    ComposeValueTransform,
    ConsistentDropout,
    ConsistentDropoutModule,
    Conv3dNet,
    ConvNet,
    DdpgCnnActor,
    DdpgCnnQNet,
    DdpgMlpActor,
    DdpgMlpQNet,
    DuelingCnnDQNet,
    IdentityValueTransform,
    NoisyLazyLinear,
    NoisyLinear,
    QValueActor,
    RBFController,
    SignedHyperbolicValueTransform,
    Squeeze2dLayer,
    SqueezeLayer,
    SymExpTwoHot,
    SymLogValueTransform,
    ValueOperator,
    reset_noise,
)
from torchrl.modules.models import ACTModel, DuelingMlpDQNet

from tdhook import Target
from tdhook.relevance.composites.presets import epsilon_plus
from tdhook.rules import EpsilonRule
from tdhook.selectors import Op

from .cases import Collection, first, inputs, keyed, ready, settled

CASES = Collection()
SMALL = {"num_cells": [3, 4], "kernel_sizes": [3, 3], "strides": [2, 1], "paddings": [0, 1]}
PIXELS = (2, 9, 9)


def q_actor(net, td, **kwargs):
    return settled(QValueActor(net, in_keys=["observation"], action_space="categorical", **kwargs), td)


def action_value(net, td):
    return q_actor(net, td), td, Target("action_value", "action")


def critic(net, td, **kwargs):
    return settled(ValueOperator(net, **kwargs), td), td, first("state_value")


# --- Feed-forward networks ------------------------------------------------------------------------


@CASES.add("MLP", "MLP", "QValueActor", "QValueModule")
def _():
    return action_value(MLP(out_features=3, num_cells=[5, 4]), inputs(2, observation=(4,)))


@CASES.add("MLP, all options", "MLP")
def _():
    net = MLP(
        4,
        (2, 3),
        num_cells=[5, 5],
        activation_class=nn.LeakyReLU,
        norm_class=nn.LayerNorm,
        norm_kwargs={"normalized_shape": 5},
        dropout=0.1,
        single_bias_last_layer=True,
    )
    return settled(Actor(net), td := inputs(2, observation=(4,))), td, Target("action", (1, 2))


@CASES.add("MLP of two inputs", "MLP", "ValueOperator")
def _():
    td = inputs(2, 3, observation=(4,), action=(2,))
    model = ValueOperator(MLP(out_features=1, num_cells=[5]), in_keys=["observation", "action"])
    return settled(model, td), td, first("state_action_value")


@CASES.add("ConvNet", "ConvNet", "Conv2dNet")
def _():
    td = inputs(2, observation=PIXELS)
    return action_value(nn.Sequential(ConvNet(**SMALL), MLP(out_features=3, num_cells=[5])), td)


@CASES.add("ConvNet for Atari", "ConvNet")
def _():
    td = inputs(2, observation=(4, 84, 84))
    net = ConvNet.default_atari_dqn(3)
    return q_actor(net, td), td, Target("action_value", "argmax")


@CASES.add("ConvNet, all options", "ConvNet", "Squeeze2dLayer")
def _():
    net = ConvNet(
        2,
        **SMALL,
        activation_class=nn.ReLU,
        norm_class=nn.BatchNorm2d,
        norm_kwargs=[{"num_features": 3}, {"num_features": 4}],
        aggregator_class=nn.AdaptiveAvgPool2d,
        aggregator_kwargs={"output_size": (1, 1)},
        squeeze_output=True,
    )
    td = inputs(2, 2, observation=PIXELS)
    return settled(Actor(net), td), td, first("action")


@CASES.add("Conv3dNet", "Conv3dNet")
def _():
    net = Conv3dNet(num_cells=[3, 4], kernel_sizes=2, strides=2)
    return critic(nn.Sequential(net, nn.LazyLinear(1)), inputs(2, observation=(2, 5, 5, 5)))


@CASES.add("DuelingMlpDQNet", "DuelingMlpDQNet")
def _():
    small = {"num_cells": [5]}
    net = DuelingMlpDQNet(
        3, mlp_kwargs_feature={**small, "out_features": 6}, mlp_kwargs_output={"num_cells": 5}
    )
    return action_value(net, inputs(2, observation=(4,)))


@CASES.add("DuelingCnnDQNet", "DuelingCnnDQNet")
def _():
    net = DuelingCnnDQNet(3, cnn_kwargs=SMALL, mlp_kwargs={"num_cells": 5})
    return action_value(net, inputs(2, observation=PIXELS))


@CASES.add("DdpgMlpActor", "DdpgMlpActor", "Actor")
def _():
    td = inputs(2, observation=(4,))
    return settled(Actor(DdpgMlpActor(2)), td), td, first("action")


@CASES.add("DdpgCnnActor", "DdpgCnnActor")
def _():
    td = inputs(2, observation=PIXELS)
    net = DdpgCnnActor(2, conv_net_kwargs=SMALL, mlp_net_kwargs={"num_cells": 5})
    return settled(keyed(net, ["observation"], ["action", "hidden"]), td), td, first("action")


@CASES.add("DdpgCnnActor, pooled", "DdpgCnnActor")
def _():
    td = inputs(2, observation=PIXELS)
    net = DdpgCnnActor(2, conv_net_kwargs=SMALL, mlp_net_kwargs={"num_cells": 5}, use_avg_pooling=True)
    return settled(keyed(net, ["observation"], ["action", "hidden"]), td), td, first("action")


@CASES.add("DdpgMlpQNet", "DdpgMlpQNet")
def _():
    td = inputs(2, observation=(4,), action=(2,))
    net = DdpgMlpQNet({"out_features": 6}, {"num_cells": [5]})
    return settled(ValueOperator(net, ["observation", "action"]), td), td, first("state_action_value")


@CASES.add("DdpgCnnQNet", "DdpgCnnQNet")
def _():
    td = inputs(2, observation=PIXELS, action=(2,))
    net = DdpgCnnQNet(SMALL, {"num_cells": 5})
    return settled(ValueOperator(net, ["observation", "action"]), td), td, first("state_action_value")


@CASES.add("BatchRenorm1d", "BatchRenorm1d")
def _():
    net = MLP(4, 2, num_cells=[5], norm_class=BatchRenorm1d, norm_kwargs={"num_features": 5})
    net[1].running_mean.normal_()
    net[1].running_var.uniform_(0.5, 2)
    td = inputs(3, observation=(4,))
    return settled(Actor(net), td), td, first("action")


@CASES.add("SqueezeLayer", "SqueezeLayer", "Squeeze2dLayer")
def _():
    net = nn.Sequential(nn.Conv2d(2, 3, 3), Squeeze2dLayer(), nn.Linear(3, 1), SqueezeLayer())
    td = inputs(2, observation=(2, 3, 3))
    return settled(ValueOperator(net), td), td, Target("state_value")


@CASES.add("ConsistentDropout", "ConsistentDropout", "ConsistentDropoutModule")
def _():
    net = nn.Sequential(nn.Linear(4, 5), ConsistentDropout(0.5), nn.Tanh())
    model = Seq(
        keyed(net, ["observation"], ["hidden"]),
        ConsistentDropoutModule(0.5, ["hidden", "mask"]),
        keyed(nn.Linear(5, 2), ["hidden"], ["action"]),
    )
    td = inputs(2, observation=(4,), mask=torch.tensor([[2.0, 0, 2, 0, 2], [0, 2, 2, 2, 0]]).double())
    ready(model)[1].train()
    return model, td, first("action")


@CASES.add("ACTModel", "ACTModel")
def _():
    net = ACTModel(4, 2, 3, hidden_dim=8, nheads=2, num_encoder_layers=1, num_decoder_layers=2, latent_dim=4)
    model = ready(keyed(net, ["observation"], ["action", "mu", "log_var"]))
    return model, inputs(2, observation=(4,)), Target("action", (1, 0))


@CASES.add("ACTModel, with actions", "ACTModel")
def _():
    net = ACTModel(4, 2, 3, hidden_dim=8, nheads=2, num_encoder_layers=1, num_decoder_layers=1, latent_dim=4)
    model = ready(keyed(net, ["observation", "chunk"], ["action", "mu", "log_var"]))
    return model, inputs(2, observation=(4,), chunk=(3, 2)), Target("action", (1, 0))


# A composite has to match something, and this model consists of operations.
WITHOUT_LAYERS = [(Op("mean"), EpsilonRule(1e-6)), *epsilon_plus()]


@CASES.add("RBFController", "RBFController", composite=WITHOUT_LAYERS)
def _():
    net = RBFController(3, 2, 1.5, n_basis=4)
    td = inputs(2, mean=(3,), covariance=torch.eye(3).double().expand(2, 3, 3) * 0.3)
    model = ready(keyed(net, ["mean", "covariance"], ["action", "action_covariance", "cross"]))
    return model, td, first("action")


# --- Noise in the weights -------------------------------------------------------------------------


def noisy(lazy):
    td = inputs(2, observation=(4,))
    if lazy:
        net = nn.Sequential(NoisyLazyLinear(5), nn.ReLU(), NoisyLazyLinear(3))
    else:
        net = MLP(4, 3, num_cells=[5], layer_class=NoisyLinear)
    model = q_actor(net, td)
    model.apply(reset_noise)
    return model, td, Target("action_value", "action")


def exploring():
    return set_exploration_type(ExplorationType.RANDOM)


@CASES.add("NoisyLinear", "NoisyLinear")
def _():
    return noisy(lazy=False)


@CASES.add("NoisyLinear, exploring", "NoisyLinear", "reset_noise", within=exploring)
def _():
    return noisy(lazy=False)


@CASES.add("NoisyLazyLinear, exploring", "NoisyLazyLinear", within=exploring)
def _():
    return noisy(lazy=True)


# --- Critics whose values are transformed ---------------------------------------------------------


@CASES.add("IdentityValueTransform", "IdentityValueTransform")
def _():
    return critic(
        nn.Sequential(MLP(4, 1, num_cells=[5]), IdentityValueTransform()), inputs(2, observation=(4,))
    )


@CASES.add("SymLogValueTransform", "SymLogValueTransform", "ValueTransform", "symlog")
def _():
    return critic(
        nn.Sequential(MLP(4, 1, num_cells=[5]), SymLogValueTransform()), inputs(2, observation=(4,))
    )


@CASES.add("SignedHyperbolicValueTransform", "SignedHyperbolicValueTransform", "signed_hyperbolic")
def _():
    net = nn.Sequential(MLP(4, 1, num_cells=[5]), SignedHyperbolicValueTransform())
    return critic(net, inputs(2, observation=(4,)))


class Inverse(nn.Module):
    def __init__(self, transform):
        super().__init__()
        self.transform = transform

    def forward(self, value):
        return self.transform.inverse(value)


@CASES.add("ComposeValueTransform, inverse", "ComposeValueTransform", "symexp", "signed_parabolic")
def _():
    transform = ComposeValueTransform(SymLogValueTransform(), SignedHyperbolicValueTransform())
    return critic(nn.Sequential(MLP(4, 1, num_cells=[5]), Inverse(transform)), inputs(2, observation=(4,)))


@CASES.add("SymExpTwoHot, odd", "SymExpTwoHot")
def _():
    return critic(nn.Sequential(MLP(4, 7, num_cells=[5]), SymExpTwoHot(7)), inputs(2, observation=(4,)))


@CASES.add("SymExpTwoHot, even", "SymExpTwoHot")
def _():
    return critic(nn.Sequential(MLP(4, 8, num_cells=[5]), SymExpTwoHot(8)), inputs(2, observation=(4,)))
