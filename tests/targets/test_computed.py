"""Targets that are computed from what a model writes, against torch.distributions and gradients.

Of a bias-free ReLU network, the epsilon rule with a vanishing epsilon gives gradient times input.
"""

from __future__ import annotations

import pickle
import warnings
from functools import partial

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import ProbabilisticTensorDictModule, TensorDictModule, TensorDictSequential
from torch import distributions as D
from torch import nn

from tdhook import LRP, Contrast, Key, Target
from tdhook.rules import EpsilonRule, PassRule, StopRule
from tdhook.selectors import Op
from tdhook.targets import Advantage, Atom, Computed, Entropy, ExpectedValue, LogProb, Probability, as_one

EXACT = [(nn.Linear, EpsilonRule(1e-12)), (nn.ReLU, PassRule())]
FLOWS = pytest.mark.parametrize("flow", ["relevance", "gradient"])
BATCHES = pytest.mark.parametrize("batch", [(), (5,), (2, 3)], ids=str)
SUPPORT = torch.linspace(-2, 3, 6, dtype=torch.float64)
ATOMS, ACTIONS = 6, 4


def network(out, *last, bias=False):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 8, bias=bias), nn.ReLU(), nn.Linear(8, out, bias=bias), *last).double()


def model_of(*keys, bias=False):
    """A network of each kind of output that is named."""
    kinds = {
        "logits": lambda: network(ACTIONS, bias=bias),
        "action_value": lambda: network(ACTIONS, bias=bias),
        "state_value": lambda: network(1, bias=bias),
        "loc": lambda: network(2, bias=bias),
        "scale": lambda: network(2, nn.Softplus(), bias=bias),
        "quantiles": lambda: network(ATOMS * ACTIONS, nn.Unflatten(-1, (ATOMS, ACTIONS)), bias=bias),
    }
    return TensorDictSequential(*(TensorDictModule(kinds[key](), ["obs"], [key]) for key in keys))


def observation(*batch, **entries):
    torch.manual_seed(2)
    entries.setdefault("action", torch.randint(ACTIONS, batch))
    return TensorDict(obs=torch.randn(*batch, 3).double(), **entries, batch_size=batch)


def explain(model, td, target, flow=None, composite=EXACT):
    method = LRP(composite, target=target, flow=flow, ledger=True, on_unmatched="raise")
    with method.prepare(model) as explained:
        td = explained(td.clone())
    assert (td["ledger", "gap"].abs() <= 1e-9 * td["ledger", "target"].abs().clamp(min=1e-3)).all()
    assert list(td.keys(True, True)) and set(explained.out_keys) <= set(td.keys(True, True))
    return td


def gradient_times_input(model, td, value):
    work = td.clone()
    x = work["obs"].requires_grad_()
    (g,) = torch.autograd.grad(value(model(work)).sum(), x)
    return (x * g).detach()


def taken(td, key="logits"):
    return lambda z: z[key].gather(-1, td["action"].unsqueeze(-1)).squeeze(-1)


# --- Policies -------------------------------------------------------------------------------------


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


# --- Critics --------------------------------------------------------------------------------------


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


# --- Whatever is computed -------------------------------------------------------------------------


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
