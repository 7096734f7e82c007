"""Targets that are computed: any function of the outputs."""

from __future__ import annotations

import pickle
import warnings

import pytest
import torch
from computed_models import (
    BATCHES,
    EXACT,
    FLOWS,
    SUPPORT,
    explain,
    gradient_times_input,
    model_of,
    observation,
)
from tensordict import TensorDict
from torch import distributions as D

from tdhook import LRP, Contrast, Key, Target
from tdhook.rules import StopRule
from tdhook.selectors import Op
from tdhook.targets import Advantage, Atom, Computed, Entropy, ExpectedValue, LogProb, Probability, as_one


@BATCHES
@FLOWS
def test_a_function(batch, flow):
    model, td = model_of("action_value"), observation(*batch, weight=torch.rand(*batch, 4).double())
    target = Computed(lambda out, td: (out["action_value"] * td["weight"]).sum(-1), key="weighted")
    out = explain(model, td, target, flow)
    torch.testing.assert_close(out["weighted"], (out["action_value"] * td["weight"]).sum(-1))
    torch.testing.assert_close(out["attr", "obs"].sum(-1), out["weighted"])
    each = explain(model, td, Computed(lambda out, td: out["action_value"] ** 2, "square", "all"), flow)
    assert each["attr", "obs"].shape == (*batch, 4, 3)
    torch.testing.assert_close(each["attr", "obs"].sum(-1), each["square"])  # an activation passes it on


@FLOWS
def test_a_function_as_one_operation(flow):
    @as_one
    def energy(z):
        return z.square().sum(-1)

    model, td = model_of("logits"), observation(5)
    target = Computed(lambda out, td: energy(out["logits"]))
    out = explain(model, td, target, flow)
    torch.testing.assert_close(
        out["attr", "obs"], gradient_times_input(model, td, lambda z: z["logits"].square())
    )
    torch.testing.assert_close(out["attr", "obs"].sum(-1), 2 * out["computed"])
    torch.testing.assert_close(out["ledger", "absorbed"], -out["computed"])
    plan = LRP(EXACT, target=target).plan(model, td)
    assert "energy" in str(plan)
    stopped = explain(model, td, target, flow, composite=[(Op("energy"), StopRule()), *EXACT])
    assert not stopped["attr", "obs"].any()
    z = torch.randn(5, 4)
    assert torch.equal(energy(z), z.square().sum(-1))  # elsewhere it is the function it was


def test_biases_take_their_share():
    """Of a ReLU network, that of a bias is bias times gradient; what the function adds is a constant."""
    model, td = model_of("logits", bias=True), observation(6)
    method = LRP(EXACT, target=Entropy(), ledger=True)
    with method.prepare(model) as explained:
        out = explained(td.clone())
        of = {
            reason: sum(entry.of(reason) for entry in explained.ledger.summary())
            for reason in ("bias", "constant")
        }
    biases = {name: p for name, p in model.named_parameters() if name.endswith("bias")}

    def entropy(biases, x):
        z = torch.func.functional_call(
            model[0].module, {n.rpartition("module.")[2]: b for n, b in biases.items()}, x
        )
        return D.Categorical(logits=z, validate_args=False).entropy()

    per_sample = torch.func.vmap(torch.func.grad(entropy), (None, 0))(biases, td["obs"])
    expected = sum((biases[name] * g).sum(-1) for name, g in per_sample.items())
    torch.testing.assert_close(of["bias"], expected.detach())
    z = out["logits"].requires_grad_()
    (g,) = torch.autograd.grad(D.Categorical(logits=z).entropy().sum(), z)
    torch.testing.assert_close(of["constant"], (out["entropy"] - (z * g).sum(-1)).detach())


def test_what_is_computed_may_be_computed_again():
    model, td = model_of("logits"), observation(5)
    explained = LRP(EXACT, target=Entropy()).wrap(model)
    first = explained(td)["attr", "obs"].clone()
    assert torch.equal(explained(td)["attr", "obs"], first)
    assert "entropy" in explained.out_keys
    assert explained(obs=td["obs"])[-1].shape == (5,)


def test_with_agents():
    model = model_of("logits")
    agents = TensorDict(obs=torch.randn(5, 2, 3).double(), action=torch.randint(4, (5, 2)), batch_size=[5])
    out = explain(model, agents, Entropy(index=1))
    assert out["entropy"].shape == (5, 2)
    assert not out["attr", "obs"][:, 0].any() and out["attr", "obs"][:, 1].any()
    each = explain(model, agents, Entropy(index="all"))
    assert each["attr", "obs"].shape == (5, 2, 2, 3) and not each["attr", "obs"][:, 0, 1].any()
    torch.testing.assert_close(
        explain(model, agents, LogProb())["ledger", "target"],
        D.Categorical(logits=out["logits"]).log_prob(agents["action"]).sum(-1),
    )


@pytest.mark.parametrize(
    "target, error, text",
    [
        (
            Entropy("logit"),
            KeyError,
            "Entropy is computed from 'logit', which is not there; there are action, logits",
        ),
        (LogProb(action=7), IndexError, "target index 7 is out of range for 'log_prob', which has 4 outputs"),
        (LogProb(action=Key("off")), KeyError, "takes its index from 'off', which is not there"),
        (
            Entropy(key="logits"),
            ValueError,
            "the module writes 'logits' itself, where Entropy is to be written",
        ),
        (Advantage(), KeyError, "Advantage is computed from 'action_value'"),
        (
            ExpectedValue(SUPPORT, "logits"),
            ValueError,
            r"'logits' of shape \(5, 4\) has no atoms: ExpectedValue",
        ),
        (
            Computed(lambda out, td: out["logits"].mean()),
            ValueError,
            r"shape \(\) for a batch of \[5\]; one value per",
        ),
        (
            Computed(lambda out, td: out["logits"].argmax(-1)),
            TypeError,
            "computes torch.int64; only floating-point",
        ),
        (Computed(lambda out, td: 1.0), TypeError, "computes float; only floating-point"),
        (
            Computed(lambda out, td: td["obs"].detach().sum(-1)),
            ValueError,
            "'computed' does not depend on any attrib",
        ),
        (
            Entropy(["logits"], distribution=lambda logits: D.LKJCholesky(4, logits.exp())),
            NotImplementedError,
            "has no closed form",
        ),
    ],
)
def test_what_does_not_fit(target, error, text):
    with pytest.raises(error, match=text):
        explain(model_of("logits"), observation(5), target)


def test_the_support_has_as_many_values_as_there_are_atoms():
    with pytest.raises(
        ValueError, match=r"the support of shape \(3,\) does not fit 'quantiles' .* has 6 atoms"
    ):
        explain(model_of("quantiles"), observation(5), ExpectedValue(SUPPORT[:3], "quantiles"))


def test_arguments_are_checked_at_once():
    with pytest.raises(ValueError, match=r"baseline='value' is none of 'mean', .* write Key\('value'\)"):
        Advantage(baseline="value")
    with pytest.raises(ValueError, match="a temperature is positive, got 0"):
        Advantage(temperature=0)
    with pytest.raises(ValueError, match="Entropy of parameters 'alpha', of no known distribution"):
        Entropy(["alpha"])
    with pytest.raises(
        TypeError, match="of a continuous distribution, action= is the key of an entry, got 1"
    ):
        LogProb(["loc", "scale"], action=1)
    with pytest.raises(TypeError, match="Computed takes a function of outputs and inputs, got str"):
        Computed("entropy")
    with pytest.raises(ValueError, match="Atom is about one action at a time, got action='all'"):
        Atom(0, action="all")
    with pytest.raises(ValueError, match="none of 'argmax', 'action', 'all'"):
        LogProb(action="taken")
    with pytest.raises(
        ValueError, match="are different values of the same name; give one of them another key="
    ):
        Contrast(Entropy(), Entropy("other"))
    with pytest.raises(ValueError, match="are different values of the same name"):
        Contrast(Target("entropy"), Entropy())


def test_they_are_values():
    assert Entropy() == Entropy() and hash(Entropy()) == hash(Entropy()) and Entropy() != Entropy("other")
    assert LogProb(action=0) != LogProb(action=1) and LogProb() != Entropy()
    assert LogProb(["a", "b"], distribution=D.Normal) == LogProb(["a", "b"], distribution=D.Normal)
    assert ExpectedValue(SUPPORT) == ExpectedValue(SUPPORT.clone()) != ExpectedValue(SUPPORT[:2])
    assert pickle.loads(pickle.dumps(Advantage(baseline=Key("v")))) == Advantage(baseline=Key("v"))
    assert repr(Entropy()) == "Entropy(parameters='logits', distribution=None, key='entropy', index=None)"


@pytest.mark.slow
@pytest.mark.parametrize(
    "target",
    [
        Contrast(Entropy(), LogProb(["loc", "scale"], action="real")),
        Contrast(Probability(), Computed(lambda out, td: (out["logits"] * td["weight"]).sum(-1))),
    ],
    ids=lambda target: type(target).__name__,
)
def test_compiled(target):
    model = model_of("logits", "loc", "scale")
    td = observation(5, weight=torch.rand(5, 4).double(), real=torch.randn(5, 2).double())
    eager, compiled = (LRP(EXACT, target=target, compile=how).wrap(model) for how in (False, True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        for _ in range(2):
            out = compiled(td.clone())
    expected = eager(td.clone())
    for key in expected.keys(True, True):
        torch.testing.assert_close(out[key], expected[key])
