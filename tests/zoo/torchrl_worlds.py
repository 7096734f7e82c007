"""World models of torchrl.modules."""

from __future__ import annotations

from typing import ClassVar

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictModuleBase
from tensordict.nn import TensorDictSequential as Seq
from torch import nn
from torchrl.data import Unbounded
from torchrl.modules import (
    MLP,
    Actor,
    DreamerActor,
    DreamerV3BlockGRU,
    DreamerV3BlockGRUCell,
    DreamerV3DiscreteActor,
    DreamerV3ImageDecoder,
    DreamerV3ImageEncoder,
    DreamerV3MLP,
    DreamerV3SeededPolicy,
    ObsDecoder,
    ObsEncoder,
    RSSMPosterior,
    RSSMPosteriorV3,
    RSSMPrior,
    RSSMPriorV3,
    RSSMRollout,
    RSSMRolloutV3,
    RSSMStateEstimatorV3,
    ValueOperator,
    WorldModel,
    WorldModelWrapper,
)

from tdhook import Target

from .cases import Collection, first, inputs, keyed, ready, settled

CASES = Collection()
SINGLE = {"tolerance": 1e-4}
"""For what computes in single precision whatever its parameters, or in part."""
RESET = torch.tensor([[True, False, False], [False, False, True]])


# --- Dreamer --------------------------------------------------------------------------------------

ACTIONS = Unbounded((2,))


def mixed_precision(model):
    """Dreamer runs its cell in single precision."""
    ready(model)
    for module in model.modules():
        if isinstance(module, nn.GRUCell):
            module.float()
    return model


def prior():
    net = RSSMPrior(ACTIONS, hidden_dim=5, rnn_hidden_dim=5, state_dim=3, action_dim=2)
    keys = ["prior_mean", "prior_std", "_", "belief"]
    return TensorDictModule(
        net, ["state", "belief", "action"], [k if k == "_" else ("next", k) for k in keys]
    )


def posterior():
    net = RSSMPosterior(hidden_dim=5, state_dim=3, rnn_hidden_dim=5, obs_embed_dim=4)
    keys = ["posterior_mean", "posterior_std", "state"]
    in_keys = [("next", "belief"), ("next", "encoded_latents")]
    return TensorDictModule(net, in_keys, [("next", key) for key in keys])


def latents(*batch, **more):
    td = inputs(*batch, state=(3,), belief=(5,), action=(2,), **more)
    return td.set(("next", "encoded_latents"), torch.randn(*batch, 4).double())


for key in ("prior_mean", "prior_std", "belief"):

    @CASES.add(f"RSSMPrior, its {key}", "RSSMPrior", **SINGLE)
    def _(key=key):
        return mixed_precision(prior()), latents(2), first(("next", key))


for key in ("posterior_std", "state"):

    @CASES.add(f"RSSMPosterior, its {key}", "RSSMPosterior")
    def _(key=key):
        td = latents(2).set(("next", "belief"), torch.randn(2, 5).double())
        return ready(posterior()), td, first(("next", key))


@CASES.add("RSSMRollout", "RSSMRollout", **SINGLE)
def _():
    return mixed_precision(RSSMRollout(prior(), posterior())), latents(1, 3), first(("next", "state"))


@CASES.add("ObsEncoder", "ObsEncoder")
def _():
    model = Seq(
        keyed(ObsEncoder(2, 2, in_channels=3), ["pixels"], ["latents"]),
        keyed(nn.LazyLinear(2), ["latents"], ["action"]),
    )
    td = inputs(2, pixels=(3, 12, 12))
    return settled(model, td), td, first("action")


@CASES.add("ObsDecoder", "ObsDecoder")
def _():
    model = keyed(ObsDecoder(2, 2, 3, latent_dim=5), ["state", "belief"], ["pixels"])
    return ready(model), inputs(2, state=(2,), belief=(3,)), Target("pixels")


for key in ("loc", "scale"):

    @CASES.add(f"DreamerActor, its {key}", "DreamerActor")
    def _(key=key):
        td = inputs(2, state=(3,), belief=(5,))
        model = keyed(DreamerActor(2, depth=2, num_cells=5), ["state", "belief"], ["loc", "scale"])
        return settled(model, td), td, first(key)


# --- Dreamer v3, which normalises in single precision ---------------------------------------------

GRU_V3 = {"projection_size": 4, "num_blocks": 2, "num_layers": 1}


@CASES.add("DreamerV3BlockGRUCell", "DreamerV3BlockGRUCell", **SINGLE)
def _():
    model = keyed(DreamerV3BlockGRUCell(4, 6, **GRU_V3), ["observation", "hidden"], ["next_hidden"])
    return ready(model), inputs(2, observation=(4,), hidden=(6,)), first("next_hidden")


@CASES.add("DreamerV3BlockGRU", "DreamerV3BlockGRU", in_keys=["observation", "hidden"], **SINGLE)
def _():
    net = DreamerV3BlockGRU(4, 6, **GRU_V3)
    model = keyed(net, ["observation", "hidden", "is_init"], ["features", "final"])
    td = inputs(2, observation=(3, 4), hidden=(6,), is_init=RESET)
    return ready(model), td, Target("features", (2, 0))


@CASES.add(
    "DreamerV3BlockGRU by scan",
    "DreamerV3BlockGRU",
    in_keys=["observation", "hidden"],
    slow=True,
    **SINGLE,
)
def _():
    net = DreamerV3BlockGRU(4, 6, recurrent_backend="scan", **GRU_V3)
    model = keyed(net, ["observation", "hidden", "is_init"], ["features", "final"])
    td = inputs(2, observation=(3, 4), hidden=(6,), is_init=RESET)
    return ready(model), td, Target("features", (2, 0))


@CASES.add("DreamerV3MLP", "DreamerV3MLP", **SINGLE)
def _():
    model = keyed(DreamerV3MLP(8, 2, depth=2, num_cells=5), ["state", "belief"], ["value"])
    return ready(model), inputs(2, state=(3,), belief=(5,)), first("value")


@CASES.add("DreamerV3ImageEncoder", "DreamerV3ImageEncoder", **SINGLE)
def _():
    net = DreamerV3ImageEncoder(2, 2, (1, 2), kernel_size=3)
    model = Seq(keyed(net, ["pixels"], ["latents"]), keyed(nn.LazyLinear(2), ["latents"], ["action"]))
    td = inputs(2, pixels=(2, 8, 8))
    return settled(model, td), td, first("action")


for blocks in (1, 2):

    @CASES.add(f"DreamerV3ImageDecoder, {blocks} blocks", "DreamerV3ImageDecoder", **SINGLE)
    def _(blocks=blocks):
        net = DreamerV3ImageDecoder(8, (2, 8, 8), 2, (1, 2), kernel_size=3, num_blocks=blocks)
        return (
            ready(keyed(net, ["state", "belief"], ["pixels"])),
            inputs(2, state=(3,), belief=(5,)),
            Target("pixels", (0, 3, 3)),
        )


def discrete_actor():
    return ready(DreamerV3DiscreteActor(8, 3, depth=1, num_cells=5))


@CASES.add("DreamerV3DiscreteActor", "DreamerV3DiscreteActor", **SINGLE)
def _():
    return discrete_actor(), inputs(2, state=(3,), belief=(5,)), first("logits")


@CASES.add("DreamerV3SeededPolicy", "DreamerV3SeededPolicy", **SINGLE)
def _():
    model = DreamerV3SeededPolicy(discrete_actor(), 0).eval()
    model.register_forward_pre_hook(lambda module, args: module.reset_counter())
    return model, inputs(2, state=(3,), belief=(5,)), first("logits")


def prior_v3(recurrent_model):
    net = RSSMPriorV3(
        action_shape=(2,),
        hidden_dim=5,
        rnn_hidden_dim=6,
        num_categoricals=2,
        num_classes=3,
        action_dim=2,
        recurrent_model=recurrent_model,
        num_blocks=2,
        unimix=0.01,
    )
    return TensorDictModule(
        net, ["state", "belief", "action"], [("next", "prior_logits"), ("next", "state"), ("next", "belief")]
    )


def posterior_v3(normed):
    net = RSSMPosteriorV3(5, 2, 3, 6, 4, use_rms_norm=normed, unimix=0.01)
    in_keys = [("next", "belief"), ("next", "encoded_latents")]
    return TensorDictModule(net, in_keys, [("next", "posterior_logits"), ("next", "state")])


def latents_v3(*batch):
    td = inputs(*batch, state=(6,), belief=(6,), action=(2,), is_init=torch.zeros(*batch, 1).bool())
    return td.set(("next", "encoded_latents"), torch.randn(*batch, 4).double())


for kind in ("gru", "block_gru"):
    for key, index in (("prior_logits", (1, 0)), ("state", None), ("belief", 0)):

        @CASES.add(f"RSSMPriorV3, {kind}, its {key}", "RSSMPriorV3", **SINGLE)
        def _(kind=kind, key=key, index=index):
            return mixed_precision(prior_v3(kind)), latents_v3(2), Target(("next", key), index)

    @CASES.add(f"RSSMRolloutV3, {kind}", "RSSMRolloutV3", **SINGLE)
    def _(kind=kind):
        model = RSSMRolloutV3(prior_v3(kind), posterior_v3(kind == "block_gru"))
        return mixed_precision(model), latents_v3(1, 3), Target(("next", "posterior_logits"), (1, 0))


@CASES.add("RSSMPosteriorV3", "RSSMPosteriorV3", **SINGLE)
def _():
    td = latents_v3(2).set(("next", "belief"), torch.randn(2, 6).double())
    return ready(posterior_v3(True)), td, Target(("next", "state"))


@CASES.add(
    "RSSMStateEstimatorV3",
    "RSSMStateEstimatorV3",
    in_keys=["state", "belief", "previous_action", "encoded_latents"],
    **SINGLE,
)
def _():
    model = RSSMStateEstimatorV3(prior_v3("block_gru").module, posterior_v3(True).module)
    td = inputs(
        2,
        state=(6,),
        belief=(6,),
        previous_action=(2,),
        encoded_latents=(4,),
        is_init=torch.tensor([[False], [False]]),
    )
    return ready(model), td, first("belief")


# --- World models ---------------------------------------------------------------------------------


@CASES.add("WorldModel", "WorldModel")
def _():
    model = WorldModel(
        keyed(MLP(4, 3, num_cells=[5]), ["observation"], ["latent"]),
        keyed(MLP(5, 3, num_cells=[5]), ["latent", "action"], ["next_latent"]),
        keyed(nn.Linear(3, 1), ["next_latent"], ["reward"]),
        done_head=keyed(nn.Linear(3, 1), ["next_latent"], ["done_logit"]),
        decoder=keyed(nn.Linear(3, 4), ["next_latent"], ["reconstruction"]),
    )
    return ready(model), inputs(2, observation=(4,), action=(2,)), first("reward")


@CASES.add("WorldModelWrapper", "WorldModelWrapper")
def _():
    model = WorldModelWrapper(
        keyed(MLP(6, 3, num_cells=[5]), ["observation", "action"], ["next_latent"]),
        keyed(nn.Linear(3, 1), ["next_latent"], ["reward"]),
    )
    return ready(model), inputs(2, observation=(4,), action=(2,)), first("reward")


class Imagination(TensorDictModuleBase):
    """A few steps of a policy inside a world model, and the rewards that it foresees."""

    in_keys: ClassVar = ["observation"]
    out_keys: ClassVar = ["return"]

    def __init__(self):
        super().__init__()
        self.policy = Actor(nn.Sequential(MLP(4, 2, num_cells=[5]), nn.Tanh()))
        self.world = WorldModelWrapper(
            keyed(MLP(6, 4, num_cells=[5]), ["observation", "action"], ["next_observation"]),
            ValueOperator(nn.Linear(4, 1), ["next_observation"], ["reward"]),
        )

    def forward(self, td):
        rewards, step = [], TensorDict({"observation": td["observation"]}, td.batch_size)
        for _ in range(3):
            step = self.world(self.policy(step))
            rewards.append(step["reward"])
            step = TensorDict({"observation": step["next_observation"]}, td.batch_size)
        return td.set("return", torch.stack(rewards).sum(0))


@CASES.add("imagined return", "WorldModelWrapper", "Actor")
def _():
    return ready(Imagination()), inputs(2, observation=(4,)), first("return")
