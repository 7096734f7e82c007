"""Targets that policies have (entropy, probabilities, densities), against torch.distributions and gradients."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from computed_models import (
    BATCHES,
    FLOWS,
    explain,
    gradient_times_input,
    model_of,
    network,
    observation,
)
from tensordict.nn import ProbabilisticTensorDictModule, TensorDictModule, TensorDictSequential
from torch import distributions as D
from torch import nn

from tdhook import Contrast, Target
from tdhook.targets import Advantage, Computed, Entropy, LogProb, Probability


@BATCHES
@FLOWS
def test_entropy_of_logits(batch, flow):
    model, td = model_of("logits"), observation(*batch)
    out = explain(model, td, Entropy(), flow)
    expected = D.Categorical(logits=out["logits"]).entropy()
    torch.testing.assert_close(out["entropy"], expected)
    torch.testing.assert_close(out["ledger", "target"], expected)
    torch.testing.assert_close(
        out["attr", "obs"],
        gradient_times_input(model, td, lambda z: D.Categorical(logits=z["logits"]).entropy()),
    )
    assert not out["entropy"].requires_grad


@BATCHES
@FLOWS
@pytest.mark.parametrize("kind", ["action", "all", "argmax", "int", "list"])
def test_probabilities_and_their_logarithms(batch, flow, kind):
    model, td = model_of("logits"), observation(*batch)
    index = {"int": 2, "list": [0, 3]}.get(kind, kind)
    for target, key, function in (
        (LogProb(action=index), "log_prob", lambda z: D.Categorical(logits=z).logits),
        (Probability(index=index), "probability", lambda z: D.Categorical(logits=z).probs),
    ):
        out = explain(model, td, target, flow)
        values = function(out["logits"])
        torch.testing.assert_close(out[key], values)
        rows = {"all": range(4), "list": [0, 3]}.get(kind)
        if rows is not None:
            for row, i in enumerate(rows):
                torch.testing.assert_close(out["ledger", "target"][..., row], values[..., i])
                expected = gradient_times_input(model, td, lambda z, i=i, f=function: f(z["logits"])[..., i])
                torch.testing.assert_close(out["attr", "obs"][..., row, :], expected)
            continue
        at = {"action": td["action"], "argmax": values.argmax(-1), "int": torch.full(batch, 2)}[kind]
        chosen = lambda z, at=at, f=function: f(z["logits"]).gather(-1, at.unsqueeze(-1))  # noqa: E731
        torch.testing.assert_close(out["ledger", "target"], chosen(out).squeeze(-1))
        torch.testing.assert_close(out["attr", "obs"], gradient_times_input(model, td, chosen))


@FLOWS
def test_a_contrast_of_log_probabilities_is_that_of_logits(flow):
    model, td = model_of("logits"), observation(5)
    out = explain(model, td, Contrast(LogProb(), LogProb(action=1)), flow)
    plain = explain(model, td, Contrast(Target("logits", "action"), Target("logits", 1)), flow)
    torch.testing.assert_close(out["attr", "obs"], plain["attr", "obs"])
    each = explain(model, td, Contrast(LogProb(), LogProb(action="all")), flow)
    assert each["attr", "obs"].shape == (5, 4, 3)
    both = Contrast(Entropy(), Computed(lambda out, td: out["logits"].amax(-1), key="top"))
    both = explain(model, td, both, flow)
    torch.testing.assert_close(both["ledger", "target"], both["entropy"] - both["top"])


@FLOWS
def test_masked_logits_take_no_part(flow):
    class Masked(nn.Module):
        def forward(self, z):
            return z.masked_fill(torch.tensor([False, True, False, False]), -torch.inf)

    net = nn.Sequential(network(4), Masked())
    model, td = TensorDictModule(net, ["obs"], ["logits"]), observation(5, action=torch.zeros(5).long())
    allowed = TensorDictModule(lambda x: net[0](x)[..., [0, 2, 3]], ["obs"], ["logits"])
    for target, value in (
        (Entropy(), lambda z: D.Categorical(logits=z["logits"]).entropy()),
        (LogProb(), lambda z: D.Categorical(logits=z["logits"]).logits[..., 0]),
        (Probability(), lambda z: D.Categorical(logits=z["logits"]).probs[..., 0]),
        (Advantage("logits"), lambda z: z["logits"][..., 0] - z["logits"].mean(-1)),
        (
            Advantage("logits", baseline="expected"),
            lambda z: z["logits"][..., 0] - (z["logits"].softmax(-1).detach() * z["logits"]).sum(-1),
        ),
    ):
        out = explain(model, td, target, flow)
        torch.testing.assert_close(out["attr", "obs"], gradient_times_input(allowed, td, value))


@BATCHES
@FLOWS
def test_normal_policies(batch, flow):
    td = observation(*batch, action=torch.randn(*batch, 2).double(), other=torch.zeros(*batch, 2).double())
    model = model_of("loc", "scale")
    parameters = ["loc", "scale"]

    def dist(z):
        return D.Independent(D.Normal(z["loc"], z["scale"]), 1)

    out = explain(model, td, LogProb(parameters), flow)
    torch.testing.assert_close(out["log_prob"], dist(out).log_prob(td["action"]))
    by_class = explain(model, td, LogProb(parameters, distribution=D.Normal), flow)
    torch.testing.assert_close(by_class["log_prob"].sum(-1), out["log_prob"])
    torch.testing.assert_close(by_class["attr", "obs"], out["attr", "obs"])
    other = explain(model, td, LogProb(parameters, action="other"), flow)
    torch.testing.assert_close(other["log_prob"], dist(out).log_prob(td["other"]))
    out = explain(model, td, Entropy(parameters), flow)
    torch.testing.assert_close(out["entropy"], dist(out).entropy())
    named = explain(model, td, Entropy({"loc": "loc", "scale": "scale"}, distribution=D.Normal), flow)
    torch.testing.assert_close(named["attr", "obs"], out["attr", "obs"])


@FLOWS
def test_the_parameters_of_a_density_have_relevance_by_their_derivative(flow):
    """With a linear network the derivative times the input is all there is."""
    torch.manual_seed(0)
    loc = TensorDictModule(nn.Linear(3, 2, bias=False).double(), ["obs"], ["loc"])
    scale = TensorDictModule(lambda x: torch.full_like(x[..., :2], 0.5), ["obs"], ["scale"])
    td = observation(5, action=torch.randn(5, 2).double())
    out = explain(TensorDictSequential(loc, scale), td, LogProb(["loc", "scale"]), flow)
    by_hand = td["obs"] * ((td["action"] - out["loc"]) / 0.25 @ loc.module.weight)
    torch.testing.assert_close(out["attr", "obs"], by_hand)
    constant = out["log_prob"] - by_hand.sum(-1)
    torch.testing.assert_close(out["ledger", "absorbed"], constant)


def test_the_target_of_a_policy_is_read_off_it():
    actor = TensorDictSequential(
        model_of("loc", "scale"),
        ProbabilisticTensorDictModule(
            in_keys={"loc": "loc", "scale": "scale"}, out_keys=["action"], distribution_class=D.Normal
        ),
    )
    td = observation(5, action=torch.randn(5, 2).double(), taken=torch.randn(5, 2).double())
    out = explain(actor, td, LogProb.of(actor, action="taken"))
    torch.testing.assert_close(out["log_prob"], D.Normal(out["loc"], out["scale"]).log_prob(td["taken"]))
    head = ProbabilisticTensorDictModule(["logits"], ["action"], distribution_class=D.OneHotCategorical)
    assert LogProb.of(head, action=1) == LogProb("logits", 1)
    assert Entropy.of(head, key="h") == Entropy("logits", key="h")
    clipped = ProbabilisticTensorDictModule(
        ["loc", "scale"],
        ["action"],
        distribution_class=D.Normal,
        distribution_kwargs={"validate_args": False},
    )
    assert isinstance(Entropy.of(clipped).distribution, partial)
    with pytest.raises(TypeError, match=r"TensorDictSequential draws from 0 distributions.*Entropy\(\['loc'"):
        Entropy.of(model_of("loc"))
