"""Actors and critics of torchrl.modules: what decides, with what it decides by, and what explores around it."""

from __future__ import annotations

import torch
from tensordict.nn import InteractionType, ProbabilisticTensorDictModule
from tensordict.nn import TensorDictSequential as Seq
from torch import nn
from torchrl.data import Bounded, Categorical, Composite, OneHot
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import (
    MLP,
    Actor,
    AdditiveGaussianModule,
    Delta,
    DiffusionActor,
    DistributionalDQNnet,
    DistributionalQValueActor,
    DistributionalQValueHook,
    DistributionalQValueModule,
    EGreedyModule,
    IndependentNormal,
    LLMMaskedCategorical,
    MaskedCategorical,
    MaskedOneHotCategorical,
    NormalParamExtractor,
    OneHotCategorical,
    OneHotOrdinal,
    Ordinal,
    OrnsteinUhlenbeckProcessModule,
    ProbabilisticActor,
    QValueActor,
    QValueHook,
    QValueModule,
    SafeModule,
    SafeProbabilisticModule,
    SafeProbabilisticTensorDictSequential,
    SafeSequential,
    TanhDelta,
    TanhModule,
    TanhNormal,
    TruncatedNormal,
)
from torchrl.modules.models.exploration import LazygSDEModule, gSDEModule

from tdhook import Target
from tdhook.relevance.composites.presets import epsilon_plus
from tdhook.rules import EpsilonRule
from tdhook.selectors import Type

from .cases import Collection, first, inputs, keyed, ready, settled

CASES = Collection()
BOX = Bounded(-1, 1, (2,), dtype=torch.float64)


def observation(**entries):
    return inputs(2, observation=(4,), **entries)


def exploring():
    return set_exploration_type(ExplorationType.RANDOM)


# --- Discrete actions -----------------------------------------------------------------------------

SPACES = {"one-hot": OneHot(3), "categorical": Categorical(3)}

for space, spec in SPACES.items():

    @CASES.add(f"QValueActor, {space}", "QValueActor", "QValueModule")
    def _(spec=spec):
        actor = QValueActor(MLP(4, 3, num_cells=[5]), in_keys=["observation"], spec=spec)
        return ready(actor), observation(), Target("chosen_action_value")


@CASES.add("QValueActor, masked", "QValueActor", "QValueModule", in_keys=["observation"])
def _():
    mask = torch.tensor([[True, False, True], [False, True, True]])
    actor = QValueActor(
        MLP(4, 3, num_cells=[5]), in_keys=["observation"], spec=OneHot(3), action_mask_key="action_mask"
    )
    return ready(actor), observation(action_mask=mask), Target("chosen_action_value")


@CASES.add("QValueActor, several choices", "QValueModule")
def _():
    model = Seq(
        keyed(MLP(4, 5, num_cells=[5]), ["observation"], ["action_value"]),
        QValueModule(action_space="mult_one_hot", var_nums=[2, 3]),
    )
    return ready(model), observation(), Target("chosen_action_value")


@CASES.add("QValueHook", "QValueHook")
def _():
    net = MLP(4, 3, num_cells=[5])
    net.register_forward_hook(QValueHook("one_hot"))
    model = Actor(net, out_keys=["action", "action_value", "chosen_action_value"])
    return ready(model), observation(), Target("chosen_action_value")


def atoms():
    return MLP(4, (4, 3), num_cells=[5]), torch.linspace(-1, 1, 4).double()


@CASES.add("DistributionalQValueActor", "DistributionalQValueActor", "DistributionalQValueModule")
def _():
    net, support = atoms()
    actor = DistributionalQValueActor(net, support, in_keys=["observation"], spec=OneHot(3))
    return ready(actor), observation(), Target("action_value", (1, 0))


@CASES.add("DistributionalDQNnet", "DistributionalDQNnet", "DistributionalQValueModule")
def _():
    net, support = atoms()
    model = Seq(
        keyed(net, ["observation"], ["action_value"]),
        DistributionalDQNnet(),
        DistributionalQValueModule("categorical", support),
    )
    return ready(model), observation(), Target("action_value", (1, 0))


@CASES.add("DistributionalQValueHook", "DistributionalQValueHook")
def _():
    net, support = atoms()
    net = nn.Sequential(net, nn.LogSoftmax(-2))
    net.register_forward_hook(DistributionalQValueHook("one_hot", support))
    return (
        ready(Actor(net, out_keys=["action", "action_value"])),
        observation(),
        Target("action_value", (1, 0)),
    )


@CASES.add("EGreedyModule, exploring", "EGreedyModule", within=exploring)
def _():
    actor = QValueActor(MLP(4, 3, num_cells=[5]), in_keys=["observation"], spec=OneHot(3))
    return ready(Seq(actor, EGreedyModule(OneHot(3)))), observation(), Target("action_value", 0)


DISCRETE = {
    "OneHotCategorical": (OneHotCategorical, {"logits": "logits"}),
    "MaskedCategorical": (MaskedCategorical, {"logits": "logits", "mask": "mask"}),
    "MaskedOneHotCategorical": (MaskedOneHotCategorical, {"logits": "logits", "mask": "mask"}),
    "Ordinal": (Ordinal, {"scores": "logits"}),
    "OneHotOrdinal": (OneHotOrdinal, {"scores": "logits"}),
}

for name, (distribution, in_keys) in DISCRETE.items():
    for target in (Target("logits", 0), Target("action_log_prob")):

        @CASES.add(f"ProbabilisticActor of {name}, its {target.key}", name, in_keys=["observation"])
        def _(distribution=distribution, in_keys=in_keys, target=target):
            mask = torch.tensor([[True, False, True], [True, True, False]])
            actor = ProbabilisticActor(
                keyed(MLP(4, 3, num_cells=[5]), ["observation"], ["logits"]),
                in_keys=in_keys,
                distribution_class=distribution,
                default_interaction_type=InteractionType.MODE,
                return_log_prob=True,
            )
            return ready(actor), observation(mask=mask), target


@CASES.add("ProbabilisticActor of LLMMaskedCategorical", "LLMMaskedCategorical", in_keys=["observation"])
def _():
    # Tokens of a response, some of which count.
    actor = ProbabilisticActor(
        keyed(MLP(4, (2, 3), num_cells=[5]), ["observation"], ["logits"]),
        in_keys=["logits", "mask"],
        distribution_class=LLMMaskedCategorical,
        default_interaction_type=InteractionType.RANDOM,
        return_log_prob=True,
    )
    mask = torch.tensor([[True, True], [True, False]])
    return ready(actor), observation(mask=mask), Target("action_log_prob", 0)


# --- Continuous actions ---------------------------------------------------------------------------


def gaussian():
    return nn.Sequential(MLP(4, 4, num_cells=[5]), NormalParamExtractor())


CONTINUOUS = {
    "TanhNormal": (TanhNormal, {"safe_tanh": False}),
    "TanhNormal, bounded": (TanhNormal, {"safe_tanh": False, "low": -2.0, "high": 1.0, "tanh_loc": True}),
    "IndependentNormal": (IndependentNormal, {}),
    "TruncatedNormal": (TruncatedNormal, {}),
}


def stochastic(distribution, **arguments):
    return ProbabilisticActor(
        keyed(gaussian(), ["observation"], ["loc", "scale"]),
        in_keys=["loc", "scale"],
        distribution_class=distribution,
        distribution_kwargs=arguments,
        return_log_prob=True,
    )


for name, (distribution, arguments) in CONTINUOUS.items():
    for target in (first("action"), first("scale"), Target("action_log_prob")):
        about = f"ProbabilisticActor of {name}, its {target.key}"

        @CASES.add(about, distribution.__name__, "ProbabilisticActor", "NormalParamExtractor")
        def _(distribution=distribution, arguments=arguments, target=target):
            return ready(stochastic(distribution, **arguments)), observation(), target


@CASES.add("ProbabilisticActor, exploring", "ProbabilisticActor", within=exploring)
def _():
    return ready(stochastic(TanhNormal, safe_tanh=False)), observation(), first("action")


@CASES.add("ProbabilisticActor of TanhNormal with a safe tanh", "TanhNormal")
def _():
    return ready(stochastic(TanhNormal)), observation(), first("action")


# With a rule, the module around a distribution is one unit, whatever it applies.
WHOLE = [(Type(ProbabilisticTensorDictModule), EpsilonRule(1e-6)), *epsilon_plus()]


@CASES.add("ProbabilisticActor of TanhNormal as a whole", "TanhNormal", composite=WHOLE)
def _():
    return ready(stochastic(TanhNormal)), observation(), first("action")


for how, deterministic, arguments in (
    ("Delta", Delta, {}),
    ("TanhDelta", TanhDelta, {"safe": False}),
    ("TanhDelta with a safe tanh", TanhDelta, {}),
):

    @CASES.add(f"ProbabilisticActor of {how}", deterministic.__name__)
    def _(distribution=deterministic, arguments=arguments):
        actor = ProbabilisticActor(
            keyed(MLP(4, 2, num_cells=[5]), ["observation"], ["param"]),
            in_keys=["param"],
            distribution_class=distribution,
            distribution_kwargs=arguments,
        )
        return ready(actor), observation(), first("action")


@CASES.add("TanhModule", "TanhModule")
def _():
    actor = Actor(MLP(4, 2, num_cells=[5]))
    squash = TanhModule(["action"], low=torch.tensor(-1.0), high=torch.tensor(3.0))
    return ready(Seq(actor, squash)), observation(), first("action")


@CASES.add("AdditiveGaussianModule, exploring", "AdditiveGaussianModule", within=exploring)
def _():
    actor = Actor(MLP(4, 2, num_cells=[5]))
    return ready(Seq(actor, AdditiveGaussianModule(BOX, 0.1, 0.1))), observation(), first("action")


@CASES.add("OrnsteinUhlenbeckProcessModule, exploring", "OrnsteinUhlenbeckProcessModule", within=exploring)
def _():
    model = Seq(Actor(MLP(4, 2, num_cells=[5])), OrnsteinUhlenbeckProcessModule(BOX))
    return ready(model), observation(is_init=torch.ones(2, 1).bool()), first("action")


class Exploration(nn.Module):
    """A policy with state-dependent exploration."""

    def __init__(self, noise):
        super().__init__()
        self.features, self.mean, self.noise = MLP(4, 3, num_cells=[5]), nn.Linear(3, 2), noise

    def forward(self, observation, eps):
        features = self.features(observation)
        return self.noise(self.mean(features), features, eps)


for kind, learned in ((gSDEModule, True), (gSDEModule, False), (LazygSDEModule, True)):
    for key in ("action", "scale"):
        how = f"{kind.__name__}, {'learned' if learned else 'fixed'}, its {key}"

        @CASES.add(how, kind.__name__, within=exploring)
        def _(kind=kind, learned=learned, key=key):
            shape = () if kind is LazygSDEModule else (2, 3)
            noise = kind(*shape, learn_sigma=learned)
            model = keyed(Exploration(noise), ["observation", "eps"], ["loc", "scale", "action", "eps"])
            td = observation(eps=(2, 3))
            return settled(model, td), td, first(key)


@CASES.add("DiffusionActor", "DiffusionActor")
def _():
    net = nn.Sequential(nn.Linear(2 + 4 + 1, 5), nn.SiLU(), nn.Linear(5, 2))
    actor = DiffusionActor(2, score_network=net, num_steps=5)
    return ready(actor), observation(), first("action")


# --- Safe modules: actions are projected into their space ------------------------------------------


@CASES.add("SafeModule", "SafeModule", "Actor")
def _():
    model = SafeModule(MLP(4, 2, num_cells=[5]), ["observation"], ["action"], spec=BOX, safe=True)
    return ready(model), observation(), first("action")


@CASES.add("SafeSequential", "SafeSequential")
def _():
    model = SafeSequential(
        SafeModule(MLP(4, 3, num_cells=[5]), ["observation"], ["hidden"]),
        SafeModule(nn.Linear(3, 2), ["hidden"], ["action"], spec=BOX, safe=True),
    )
    return ready(model), observation(), first("action")


@CASES.add("SafeProbabilisticModule", "SafeProbabilisticModule", "SafeProbabilisticTensorDictSequential")
def _():
    sample = SafeProbabilisticModule(
        ["loc", "scale"],
        ["action"],
        spec=Composite(action=BOX),
        safe=True,
        distribution_class=TanhNormal,
        distribution_kwargs={"safe_tanh": False},
    )
    head = SafeModule(gaussian(), ["observation"], ["loc", "scale"], spec=Composite(loc=None, scale=None))
    return ready(SafeProbabilisticTensorDictSequential(head, sample)), observation(), first("action")
