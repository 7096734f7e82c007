"""Networks of several agents, mixers and ensembles of torchrl.modules."""

from __future__ import annotations

from typing import ClassVar

import torch
from tensordict import TensorDict, TensorDictParams
from tensordict.nn import EnsembleModule, TensorDictModuleBase
from tensordict.nn import TensorDictSequential as Seq
from torch import nn
from torchrl.modules import (
    MLP,
    ConvNet,
    CrossCriticGroupSpec,
    CrossGroupCritic,
    MultiAgentConvNet,
    MultiAgentMLP,
    QMixer,
    QValueActor,
    ValueOperator,
    VDNMixer,
    VmapModule,
)

from tdhook import Target

from .cases import Collection, first, inputs, keyed, ready, settled

CASES = Collection()
SMALL = {"num_cells": [3, 4], "kernel_sizes": [3, 3], "strides": [2, 1], "paddings": [0, 1]}
PIXELS = (2, 9, 9)


# --- Several agents -------------------------------------------------------------------------------


def multi_agent(net, td):
    return settled(keyed(net, ["observation"], ["value"]), td), td, Target("value", (1, 0))


for centralized in (False, True):
    for shared in (False, True):
        how = (
            f"{'centralized' if centralized else 'decentralized'}, {'shared' if shared else 'own'} parameters"
        )

        @CASES.add(f"MultiAgentMLP, {how}", "MultiAgentMLP", "MultiAgentNetBase")
        def _(centralized=centralized, shared=shared):
            net = MultiAgentMLP(4, 2, 3, centralized=centralized, share_params=shared, num_cells=[5])
            return multi_agent(net, inputs(2, observation=(3, 4)))

        @CASES.add(f"MultiAgentConvNet, {how}", "MultiAgentConvNet", "MultiAgentNetBase")
        def _(centralized=centralized, shared=shared):
            net = MultiAgentConvNet(
                3, centralized, shared, in_features=2, num_cells=[3, 2], kernel_sizes=3, strides=2
            )
            return multi_agent(net, inputs(2, observation=(3, 2, 9, 9)))


@CASES.add("MultiAgentMLP, parameters in a plain TensorDict", "MultiAgentMLP")
def _():
    net = MultiAgentMLP(
        4,
        2,
        3,
        centralized=False,
        share_params=False,
        num_cells=[5],
        activation_class=nn.ReLU,
        use_td_params=False,
    )
    return multi_agent(net, inputs(2, observation=(3, 4)))


@CASES.add("MultiAgentMLP, lazy", "MultiAgentMLP")
def _():
    net = MultiAgentMLP(None, 2, 3, centralized=False, share_params=True, num_cells=[5])
    return multi_agent(net, inputs(2, 2, observation=(3, 4)))


@CASES.add("CrossGroupCritic", "CrossGroupCritic", "CrossCriticGroupSpec")
def _():
    groups = {
        "walkers": CrossCriticGroupSpec(4, 2, ("walkers", "observation"), ("walkers", "state_value")),
        "flyers": CrossCriticGroupSpec(3, 1, ("flyers", "observation"), ("flyers", "state_value")),
    }
    model = CrossGroupCritic(groups, d_model=4, trunk_depth=1, trunk_cells=5)
    walkers, flyers = inputs(2, observation=(2, 4)), inputs(2, observation=(1, 3))
    td = TensorDict({"walkers": walkers, "flyers": flyers}, batch_size=[2])
    return ready(model), td, Target(("walkers", "state_value"), (1, 0))


def mixed(mixer, in_keys, td):
    agents = QValueActor(
        MultiAgentMLP(4, 3, 2, centralized=False, share_params=True, num_cells=[5]),
        in_keys=["observation"],
        action_space="categorical",
    )
    model = Seq(agents, keyed(mixer, ["chosen_action_value", *in_keys], ["value"]))
    return ready(model), td, first("value")


@CASES.add("VDNMixer", "VDNMixer")
def _():
    return mixed(VDNMixer(2, "cpu"), [], inputs(2, observation=(2, 4)))


@CASES.add("QMixer", "QMixer")
def _():
    mixer = QMixer((2, 3), mixing_embed_dim=4, n_agents=2, device="cpu")
    return mixed(mixer, ["state"], inputs(2, observation=(2, 4), state=(2, 3)))


# --- Ensembles, as the losses of torchrl run them -------------------------------------------------


class Ensemble(nn.Module):
    """Critics whose stacked parameters a vmapped function takes."""

    def __init__(self, make, count):
        super().__init__()
        self.params = TensorDictParams(
            TensorDict.from_modules(*(make() for _ in range(count)), as_module=False)
        )
        self.__dict__["net"] = make().to("meta")

    def forward(self, *inputs):
        def call(params, *inputs):
            with params.to_module(self.net):
                return self.net(*inputs)

        return torch.vmap(call, (0, *(None for _ in inputs)))(self.params, *inputs).min(0).values


@CASES.add("ensemble by vmap", "MLP")
def _():
    td = inputs(2, observation=(4,), action=(2,))
    net = Ensemble(lambda: MLP(6, 1, num_cells=[5]).double(), 3)
    return ValueOperator(net.eval(), ["observation", "action"]), td, first("state_action_value")


@CASES.add("ensemble of ConvNets by vmap", "ConvNet")
def _():
    td = inputs(2, observation=PIXELS)
    net = Ensemble(lambda: nn.Sequential(ConvNet(2, **SMALL), nn.Linear(64, 1)).double(), 2)
    return ValueOperator(net.eval()), td, first("state_value")


class Averaged(TensorDictModuleBase):
    """The mean of an ensemble, whose values have one batch axis more than what it is called with."""

    in_keys: ClassVar = ["observation"]
    out_keys: ClassVar = ["state_value"]

    def __init__(self, ensemble):
        super().__init__()
        self.ensemble = ensemble

    def forward(self, td):
        return td.set("state_value", self.ensemble(td.copy())["state_value"].mean(0))


@CASES.add("EnsembleModule", "ValueOperator")
def _():
    model = EnsembleModule(ready(ValueOperator(MLP(4, 1, num_cells=[5]))), num_copies=3)
    return ready(Averaged(model)), inputs(2, observation=(4,)), first("state_value")


@CASES.add("VmapModule", "VmapModule")
def _():
    net = ready(keyed(nn.Linear(4, 2), ["observation"], ["action"]))
    return VmapModule(net, 0), inputs(3, observation=(4,)), first("action")
