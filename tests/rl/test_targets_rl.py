"""Targets of torchrl's agents: their distributions, distributional critics, loss terms and TD errors."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import NormalParamExtractor, TensorDictModule
from torch import nn

pytest.importorskip("torchrl")

from torchrl.data import Bounded, Categorical, OneHot
from torchrl.modules import (
    MLP,
    DistributionalQValueActor,
    OneHotCategorical,
    ProbabilisticActor,
    QValueActor,
    TanhNormal,
    ValueOperator,
)
from torchrl.objectives import (
    A2CLoss,
    ClipPPOLoss,
    DDPGLoss,
    DistributionalDQNLoss,
    DQNLoss,
    SACLoss,
    SoftUpdate,
    TD3Loss,
)

from tdhook import LRP, Contrast, Target
from tdhook.rl import LossTerm, TDError
from tdhook.rules import EpsilonRule, PassRule
from tdhook.targets import Advantage, Atom, Computed, Entropy, ExpectedValue, LogProb, Probability

EXACT = [(nn.Linear, EpsilonRule(1e-12)), (nn.ReLU, PassRule())]
SUPPORT = torch.linspace(-3, 4, 5, dtype=torch.float64)
FLOWS = pytest.mark.parametrize("flow", ["relevance", "gradient"])


def mlp(inputs, outputs, bias=True):
    torch.manual_seed(1)
    sizes = {"num_cells": [16], "activation_class": nn.ReLU, "layer_kwargs": {"bias": bias}}
    return MLP(in_features=inputs, out_features=outputs, **sizes).double()


def data(*batch, actions=None):
    torch.manual_seed(2)
    action = torch.rand(*batch, 2).double() - 0.5 if actions is None else actions.rand(batch)
    following = {
        "observation": torch.randn(*batch, 4).double(),
        "reward": torch.randn(*batch, 1).double(),
        "terminated": torch.rand(*batch, 1) < 0.3,
    }
    following["done"] = following["terminated"].clone()
    entries = {"observation": torch.randn(*batch, 4).double(), "action": action, "next": following}
    return TensorDict(entries, batch_size=batch)


def explain(model, td, target, flow=None, composite=EXACT, **options):
    method = LRP(composite, target=target, flow=flow, ledger=True, on_unmatched="raise", **options)
    with method.prepare(model) as explained:
        td = explained(td.clone())
    assert (td["ledger", "gap"].abs() <= 1e-9 * td["ledger", "target"].abs().clamp(min=1e-3)).all()
    return td


def q_actor(space=None):
    return QValueActor(mlp(4, 2), in_keys=["observation"], spec=space or OneHot(2))


def categorical_actor():
    return ProbabilisticActor(
        TensorDictModule(mlp(4, 2), ["observation"], ["logits"]),
        in_keys=["logits"],
        spec=OneHot(2),
        distribution_class=OneHotCategorical,
        return_log_prob=True,
    )


def squashed_actor(bias=True):
    return ProbabilisticActor(
        TensorDictModule(
            nn.Sequential(mlp(4, 4, bias), NormalParamExtractor("exp")), ["observation"], ["loc", "scale"]
        ),
        in_keys=["loc", "scale"],
        distribution_class=TanhNormal,
    )


class Critic(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = mlp(6, 1)

    def forward(self, observation, action):
        return self.net(torch.cat([observation, action], -1))


def critic():
    return ValueOperator(mlp(4, 1), in_keys=["observation"])


def q_critic():
    return ValueOperator(Critic(), in_keys=["observation", "action"])


# --- Policies and critics -------------------------------------------------------------------------


@FLOWS
def test_a_squashed_normal_policy(flow):
    actor, td = squashed_actor(bias=False), data(5)
    target = LogProb.of(actor, action="taken")
    td["taken"] = td["action"].clone()
    out = explain(actor, td, target, flow)
    dist = TanhNormal(out["loc"], out["scale"])
    torch.testing.assert_close(out["log_prob"], dist.log_prob(td["taken"]))
    # The change of variables of the squashing is a constant of the action.
    normal = torch.distributions.Normal(out["loc"], out["scale"]).log_prob(td["taken"].atanh()).sum(-1)
    change = torch.log1p(-td["taken"].square()).sum(-1)
    torch.testing.assert_close(out["log_prob"], normal - change, rtol=1e-6, atol=1e-6)
    x = td["observation"].clone().requires_grad_()
    work = TensorDict({"observation": x}, [5])
    loc, scale = actor[0].module(work["observation"])
    value = torch.distributions.Normal(loc, scale).log_prob(td["taken"].atanh()).sum()
    for parameter in (loc, scale):  # the exponential passes relevance, so each parameter is looked at alone
        (g,) = torch.autograd.grad(value, parameter, retain_graph=True)
        assert g.isfinite().all()
    same = explain(actor, td, LogProb(["loc", "scale"], "taken", TanhNormal), flow)
    torch.testing.assert_close(same["attr", "observation"], out["attr", "observation"])
    entropy = explain(actor, td, Entropy(["loc", "scale"]), flow)
    expected = torch.distributions.Normal(out["loc"], out["scale"]).entropy().sum(-1)
    torch.testing.assert_close(entropy["entropy"], expected)
    with pytest.raises(
        NotImplementedError, match=r"the entropy of TanhNormal has no closed form .*Entropy\(\['loc'"
    ):
        explain(actor, td, Entropy.of(actor), flow)


def test_the_action_that_was_drawn():
    """The squashing of torchrl, which has a backward pass of its own, runs as the activations that it is."""
    actor, td = squashed_actor(bias=False), data(5)
    for flow in ("relevance", "gradient"):
        out = explain(actor, td, Target("action"), flow)
        loc = explain(actor, td, Target("loc"), flow)
        torch.testing.assert_close(out["action"], loc["loc"].tanh())
        ratio = out["ledger", "target"] / loc["ledger", "target"]
        assert ratio.isfinite().all()
    from torchrl.modules.distributions import continuous, utils

    y = torch.randn(3)
    assert torch.equal(continuous.safetanh_noeps(y), utils.safetanh_noeps(y))  # elsewhere it does what it did


@FLOWS
def test_a_categorical_policy(flow):
    actor, td = categorical_actor(), data(3, 4, actions=OneHot(2))
    out = explain(actor, td, LogProb.of(actor), flow)
    taken = out["log_prob"].gather(-1, out["action"].long().argmax(-1, keepdim=True)).squeeze(-1)
    torch.testing.assert_close(out["ledger", "target"], taken)
    torch.testing.assert_close(out["action_log_prob"], taken)
    assert explain(actor, td, Entropy.of(actor), flow)["entropy"].shape == (3, 4)
    assert explain(actor, td, Probability(index="all"), flow)["attr", "observation"].shape == (3, 4, 2, 4)


@FLOWS
@pytest.mark.parametrize("space", [OneHot(2), Categorical(2)], ids=["one-hot", "categorical"])
def test_a_q_value_actor(flow, space):
    actor, td = q_actor(space), data(5)
    out = explain(actor, td, Advantage(), flow)
    q = out["action_value"]
    torch.testing.assert_close(out["ledger", "target"], q.amax(-1) - q.mean(-1))
    contrast = explain(actor, td, Contrast(Target("action_value", "action"), Target("action_value", 0)), flow)
    of_zero = explain(actor, td, Contrast(Advantage(), Advantage(index=0)), flow)
    torch.testing.assert_close(of_zero["attr", "observation"], contrast["attr", "observation"])


@FLOWS
def test_a_distributional_actor(flow):
    actor = DistributionalQValueActor(
        mlp(4, (5, 2)), support=SUPPORT, in_keys=["observation"], spec=OneHot(2)
    )
    td = data(3, 2)
    out = explain(actor, td, ExpectedValue(SUPPORT), flow)
    assert out["action_value"].shape == (3, 2, 5, 2) and out["expected_value"].shape == (3, 2, 2)
    torch.testing.assert_close(out["ledger", "target"], out["expected_value"].amax(-1))  # it is greedy
    atoms = explain(actor, td, Atom("all"), flow)
    assert atoms["attr", "observation"].shape == (3, 2, 5, 4)
    weighted = (atoms["ledger", "target"] * SUPPORT).sum(-1)
    torch.testing.assert_close(weighted, out["ledger", "target"])
    # Both are linear in the gradient: the expectation's relevance is that of the atoms, weighted.
    combined = (atoms["attr", "observation"] * SUPPORT.unsqueeze(-1)).sum(-2)
    torch.testing.assert_close(combined, out["attr", "observation"])


# --- The TD error ---------------------------------------------------------------------------------


@FLOWS
@pytest.mark.parametrize("batch", [(), (5,), (3, 4)], ids=str)
def test_the_td_error(flow, batch):
    value, td = critic(), data(*batch)
    model = TDError(value, gamma=0.9)
    out = explain(model, td, Target("td_error"), flow)
    now, then = value(td.clone())["state_value"], value(td["next"].clone())["state_value"]
    goes_on = 0.9 * (~td["next", "terminated"]).double()
    error = td["next", "reward"] + goes_on * then - now
    torch.testing.assert_close(out["td_error"], error.detach())
    torch.testing.assert_close(out["attr", "next", "reward"], td["next", "reward"])
    own = explain(value, td, Target("state_value"), flow)["attr", "observation"]
    torch.testing.assert_close(out["attr", "observation"], -own)
    ahead = explain(value, td["next"], Target("state_value"), flow)["attr", "observation"]
    torch.testing.assert_close(out["attr", "next", "observation"], goes_on * ahead)


def test_the_td_error_with_another_critic_for_the_next_step():
    td, other = data(5), ValueOperator(mlp(4, 1), in_keys=["observation"], out_keys=["state_value"])
    with torch.no_grad():
        other.module[0].weight.mul_(2.0)
    out = explain(TDError(critic(), 0.9, other), td, "td_error")
    ahead = explain(other, td["next"], "state_value")["attr", "observation"]
    goes_on = 0.9 * (~td["next", "terminated"]).double()
    torch.testing.assert_close(out["attr", "next", "observation"], goes_on * ahead)
    with pytest.raises(
        ValueError, match=r"the critic writes .*'state_value'.* and not 'value': give value_key="
    ):
        TDError(other, 0.9, value_key="value")
    with pytest.raises(KeyError, match=r"there is no entry .*'terminated'.*; give terminated_key="):
        explain(TDError(other, 0.9), td.exclude(("next", "terminated")), "td_error")


# --- Terms of losses ------------------------------------------------------------------------------


def on_policy(*batch):
    td = categorical_actor()(data(*batch, actions=OneHot(2)))
    td["observation"] = td["observation"] + 0.1
    td["advantage"], td["value_target"] = torch.randn(2, *batch, 1).double()
    return td.detach()


def on_states(loss, gamma=0.9):
    loss.make_value_estimator(gamma=gamma)
    SoftUpdate(loss, eps=0.9)  # else torchrl warns that nothing updates the target networks
    return loss


LOSSES = {
    "DQN": (lambda: on_states(DQNLoss(q_actor(), reduction="none", delay_value=True)), ["loss"]),
    "double DQN": (
        lambda: on_states(DQNLoss(q_actor(), reduction="none", delay_value=True, double_dqn=True)),
        ["loss"],
    ),
    "PPO": (
        lambda: ClipPPOLoss(categorical_actor(), critic(), reduction="none"),
        ["loss_objective", "loss_critic", "loss_entropy"],
    ),
    "A2C": (
        lambda: A2CLoss(categorical_actor(), critic(), reduction="none"),
        ["loss_objective", "loss_critic"],
    ),
    "SAC": (
        lambda: on_states(
            SACLoss(squashed_actor(), q_critic(), reduction="none", action_spec=Bounded(-1, 1, (2,)))
        ),
        ["loss_actor", "loss_qvalue"],
    ),
    "DDPG": (
        lambda: on_states(
            DDPGLoss(TensorDictModule(mlp(4, 2), ["observation"], ["action"]), q_critic(), reduction="none")
        ),
        ["loss_actor", "loss_value"],
    ),
    "TD3": (
        lambda: on_states(
            TD3Loss(
                TensorDictModule(mlp(4, 2), ["observation"], ["action"]),
                q_critic(),
                reduction="none",
                action_spec=Bounded(-1, 1, (2,)),
            )
        ),
        ["loss_actor", "loss_qvalue"],
    ),
}
TERMS = [(name, key) for name, (_, keys) in LOSSES.items() for key in keys]


@pytest.mark.filterwarnings("ignore:SACLoss with reduction='none' cannot include scalar values")
@FLOWS
@pytest.mark.parametrize("name, key", TERMS)
@pytest.mark.parametrize("batch", [(5,), (3, 4)], ids=str)
def test_terms_of_losses(name, key, batch, flow):
    loss = LOSSES[name][0]()
    td = (
        on_policy(*batch)
        if name in ("PPO", "A2C")
        else data(*batch, actions=OneHot(2) if "DQN" in name else None)
    )
    before = {name: p.clone() for name, p in loss.named_parameters()}
    torch.manual_seed(0)
    expected = loss(td.clone())[key].detach()
    torch.manual_seed(0)
    out = explain(LossTerm(loss, key), td, Target(key), flow)
    torch.testing.assert_close(out[key].sum(), expected.sum())
    torch.testing.assert_close(
        out["ledger", "target"].flatten(), out[key].reshape(*batch, -1).sum(-1).flatten()
    )
    assert out["attr", "observation"].shape == (*batch, 4) and out["attr", "observation"].any()
    assert set(out.keys()) - set(td.keys()) == {key, "attr", "ledger"} - set(td.keys())
    for parameter, value in loss.named_parameters():
        assert torch.equal(value, before[parameter]) and value.grad is None
    assert all(p.requires_grad for n, p in loss.named_parameters() if "target" not in n)


def test_the_relevance_of_a_squared_td_error_is_that_of_the_error():
    """An activation passes relevance on: that of the loss is that of the error, times the error or its half."""
    loss = on_states(DQNLoss(q_actor(), reduction="none", delay_value=True, loss_function="l2"))
    td = data(5, actions=OneHot(2))
    out = explain(LossTerm(loss, "loss"), td, "loss")

    def error(outputs, inputs):
        return outputs["action_value"].gather(-1, td["action"].long().argmax(-1, keepdim=True))

    q = explain(q_actor(), td, Computed(error, "taken"))
    best = q_actor()(td["next"].clone())["chosen_action_value"].detach()
    goes_on = 0.9 * (~td["next", "terminated"]).double()
    difference = q["taken"] - (td["next", "reward"] + goes_on * best)
    torch.testing.assert_close(out["loss"], difference.squeeze(-1).square())
    torch.testing.assert_close(out["attr", "observation"], difference * q["attr", "observation"])


def test_a_distributional_loss():
    actor = DistributionalQValueActor(
        mlp(4, (5, 2)), support=SUPPORT, in_keys=["observation"], spec=OneHot(2)
    )
    loss = on_states(DistributionalDQNLoss(actor, gamma=0.9, reduction="none", delay_value=True))
    td = data(6, actions=OneHot(2)).float()
    loss.float()  # torchrl computes the targets in single precision
    method = LRP("epsilon", target="loss", ledger=True, on_unmatched="raise")
    out = method.wrap(LossTerm(loss, "loss"))(td)
    assert (out["ledger", "gap"].abs() <= 1e-5 * out["ledger", "target"].abs()).all()
    assert out["loss"].shape == (6,) and out["attr", "observation"].any()


def test_terms_that_cannot_be_explained():
    with pytest.raises(ValueError, match=r"DQNLoss has reduction='mean'; .* make one with reduction='none'"):
        LossTerm(DQNLoss(q_actor(), delay_value=True), "loss")
    loss = ClipPPOLoss(categorical_actor(), critic(), reduction="none")
    with pytest.raises(KeyError, match=r"ClipPPOLoss writes no term 'loss'; it writes .*loss_objective"):
        explain(LossTerm(loss, "loss"), on_policy(5), "loss")
    with pytest.raises(
        ValueError, match=r"the term 'entropy' of ClipPPOLoss has the shape \(\) for a batch of \[5\]"
    ):
        explain(LossTerm(loss, "entropy"), on_policy(5), "entropy")
    with pytest.raises(ValueError, match="the target 'loss_critic' does not depend on any attributed input"):
        explain(LossTerm(loss, "loss_critic", attributed=["advantage"]), on_policy(5), "loss_critic")


def test_several_terms_of_one_run():
    loss = ClipPPOLoss(categorical_actor(), critic(), reduction="none")
    model = LossTerm(loss, ["loss_objective", "loss_critic"])
    out = explain(model, on_policy(5), "loss_critic")
    assert {"loss_objective", "loss_critic"} <= set(out.keys())
    alone = explain(LossTerm(loss, "loss_critic"), on_policy(5), "loss_critic")
    torch.testing.assert_close(out["attr", "observation"], alone["attr", "observation"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["td error", "log prob"])
def test_compiled(name):
    model, target, td = {
        "td error": (TDError(critic(), 0.9), Target("td_error"), data(5)),
        "log prob": (squashed_actor(), LogProb(["loc", "scale"], "taken", TanhNormal), data(5)),
    }[name]
    td["taken"] = td["action"].clone()
    eager, compiled = (LRP(EXACT, target=target, compile=how).wrap(model) for how in (False, True))
    for _ in range(2):
        td["next", "terminated"] = ~td["next", "terminated"]
        out, expected = compiled(td.clone()), eager(td.clone())
        for key in expected.keys(True, True):
            torch.testing.assert_close(out[key], expected[key])
