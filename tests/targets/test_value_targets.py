"""Targets that critics have: advantages, values that are distributions."""

from __future__ import annotations

import pytest
import torch
from computed_models import (
    ACTIONS,
    ATOMS,
    BATCHES,
    FLOWS,
    SUPPORT,
    explain,
    gradient_times_input,
    model_of,
    observation,
)
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn

from tdhook import LRP, Contrast, Key, Target
from tdhook.attribution import IntegratedGradients
from tdhook.relevance.secants import averages
from tdhook.targets import Advantage, Atom, Entropy, ExpectedValue


@BATCHES
@FLOWS
@pytest.mark.parametrize("baseline", ["mean", "max", "expected"])
def test_advantages(batch, flow, baseline):
    model, td = model_of("action_value"), observation(*batch)

    def advantage(z):
        q = z["action_value"]
        v = {
            "mean": q.mean(-1, keepdim=True),
            "max": q.amax(-1, keepdim=True),
            "expected": ((q / 0.5).softmax(-1).detach() * q).sum(-1, keepdim=True),
        }[baseline]
        return q - v

    target = Advantage(baseline=baseline, temperature=0.5)
    out = explain(model, td, target, flow)
    torch.testing.assert_close(out["action_advantage"], advantage(out))
    torch.testing.assert_close(
        out["attr", "obs"],
        gradient_times_input(model, td, lambda z: advantage(z).gather(-1, td["action"].unsqueeze(-1))),
    )
    torch.testing.assert_close(out["attr", "obs"].sum(-1), out["ledger", "target"])  # nothing is absorbed
    each = explain(model, td, Advantage(index="all", baseline=baseline, temperature=0.5), flow)
    for i in range(ACTIONS):
        expected = gradient_times_input(model, td, lambda z, i=i: advantage(z)[..., i])
        torch.testing.assert_close(each["attr", "obs"][..., i, :], expected)


def test_the_mean_of_values_in_double_precision_is_one():
    model, td = model_of("action_value"), observation(7)
    out = explain(model, td, Advantage(index="all"), "relevance")
    q = out["action_value"]
    torch.testing.assert_close(out["action_advantage"], q - q.mean(-1, keepdim=True), rtol=1e-14, atol=1e-14)


@FLOWS
def test_an_advantage_over_a_critic_is_a_contrast(flow):
    model, td = model_of("action_value", "state_value"), observation(2, 3)
    out = explain(model, td, Advantage(baseline=Key("state_value")), flow)
    contrast = Contrast(Target("action_value", "action"), Target("state_value"))
    torch.testing.assert_close(out["attr", "obs"], explain(model, td, contrast, flow)["attr", "obs"])
    known = observation(2, 3, state_value=torch.randn(2, 3).double())
    alone = explain(model_of("action_value"), known, Advantage(baseline=Key("state_value")), flow)
    q = explain(model_of("action_value"), known, Target("action_value", "action"), flow)
    torch.testing.assert_close(alone["attr", "obs"], q["attr", "obs"])  # the constant takes its part
    torch.testing.assert_close(alone["ledger", "absorbed"], -known["state_value"])


@BATCHES
@FLOWS
def test_distributional_values(batch, flow):
    model = model_of("quantiles")
    model = TensorDictSequential(
        model, TensorDictModule(lambda z: z.log_softmax(-2), ["quantiles"], ["action_value"])
    )
    td = observation(*batch)
    support = SUPPORT.unsqueeze(-1)
    out = explain(model, td, ExpectedValue(SUPPORT), flow)
    torch.testing.assert_close(out["expected_value"], (out["action_value"].exp() * support).sum(-2))

    def expectation(z):
        return (z["quantiles"].softmax(-2) * support).sum(-2).gather(-1, td["action"].unsqueeze(-1))

    torch.testing.assert_close(out["attr", "obs"], gradient_times_input(model, td, expectation))
    out = explain(model, td, Atom("all"), flow)
    assert out["attr", "obs"].shape == (*batch, ATOMS, 3) and out["atoms"].shape == (*batch, ATOMS)
    torch.testing.assert_close(out["atoms"].sum(-1), torch.ones(batch).double())
    at = td["action"][..., None, None].expand(*batch, ATOMS, 1)
    for i in range(ATOMS):
        expected = gradient_times_input(
            model, td, lambda z, i=i: z["quantiles"].softmax(-2).gather(-1, at)[..., i, 0]
        )
        torch.testing.assert_close(out["attr", "obs"][..., i, :], expected)
    hot = observation(*batch, action=nn.functional.one_hot(td["action"], ACTIONS))
    one = explain(model, hot, Atom(2), flow)
    torch.testing.assert_close(one["attr", "obs"], out["attr", "obs"][..., 2, :])


@FLOWS
def test_quantiles(flow):
    model, td = model_of("quantiles"), observation(5)
    out = explain(model, td, ExpectedValue(None, "quantiles"), flow)
    torch.testing.assert_close(out["expected_value"], out["quantiles"].mean(-2))
    chosen = out["expected_value"].gather(-1, td["action"].unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(out["attr", "obs"].sum(-1), chosen)
    out = explain(model, td, Atom(1, action=3, quantiles=True, action_value="quantiles"), flow)
    torch.testing.assert_close(out["attr", "obs"].sum(-1), out["quantiles"][:, 1, 3])


@FLOWS
@pytest.mark.parametrize(
    "target",
    [ExpectedValue(SUPPORT, index=1), Atom(2, action=1), Entropy(["loc", "scale"])],
    ids=["expectation", "atom", "entropy"],
)
def test_functions_of_single_values_have_a_closed_form_between_two_inputs(target, flow, monkeypatch):
    """It is their integrated gradient, without a node on the way."""
    torch.manual_seed(0)
    read = target.explains
    shape = (4, ATOMS, ACTIONS) if read == ["action_value"] else (4, 3)
    module = TensorDictModule(lambda *x: tuple(each + 0.0 for each in x), [f"of {key}" for key in read], read)
    td = TensorDict({key: 4 * torch.rand(shape).double() + 0.1 for key in module.in_keys}, [4])
    if read == ["action_value"]:
        td["of action_value"] = (10 * td["of action_value"]).log_softmax(-2)
    wanted = IntegratedGradients(target=target, baseline=0.5, steps=200).wrap(module)(td.copy())["attr"]
    at_nodes = averages._quadrature

    def halfway(pair, grads, count):
        assert count == 1
        return at_nodes(pair, grads, count)

    monkeypatch.setattr(averages, "_quadrature", halfway)
    found = LRP("deeplift", target=target, baseline=0.5, flow=flow).wrap(module)(td.copy())["attr"]
    for key in module.in_keys:
        torch.testing.assert_close(found[key], wanted[key])
