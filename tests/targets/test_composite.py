"""Targets of policies that draw from several distributions at once: torchrl's composite ones."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import CompositeDistribution, TensorDictModule, set_composite_lp_aggregate
from torch import distributions, nn
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import ProbabilisticActor

from tdhook import LRP, Key, Target
from tdhook.attribution import Gradient, IntegratedGradients
from tdhook.targets import AtStep, Computed, Contrast, Entropy, LogProb, Probability

PARTS = {"steer": distributions.Normal, "gear": distributions.Categorical}
NAMES = {"steer": ("action", "steer"), "gear": ("action", "gear")}
LOGITS = ("params", "gear", "logits")
PARAMETERS = [("params", "steer", "loc"), ("params", "steer", "scale"), LOGITS]


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 10)

    def forward(self, x):
        y = self.layer(x)
        return y[..., :3], y[..., 3:6].exp(), y[..., 6:]


def actor(named=True, **options):
    torch.manual_seed(0)
    kwargs = {"distribution_map": PARTS, **({"name_map": NAMES} if named else {})}
    return ProbabilisticActor(
        TensorDictModule(Heads(), ["observation"], PARAMETERS),
        in_keys=["params"],
        distribution_class=CompositeDistribution,
        distribution_kwargs=kwargs,
        **options,
    )


def batch(*shape):
    torch.manual_seed(1)
    return TensorDict({"observation": torch.randn(*shape, 5)}, shape)


@pytest.fixture(params=[True, False])
def aggregate(request):
    with set_composite_lp_aggregate(request.param):
        yield


def gear(named):
    return Key(("action", "gear") if named else "gear")


TARGETS = {
    "logit": lambda policy, named: Target(LOGITS, 0),
    "logit of the action": lambda policy, named: Target(LOGITS, gear(named)),
    "contrast": lambda policy, named: Contrast(Target(LOGITS, gear(named)), Target(LOGITS, 1)),
    "log-probability": lambda policy, named: LogProb.of(policy),
    "entropy": lambda policy, named: Entropy.of(policy),
    "log-probability of a part": lambda policy, named: LogProb(LOGITS, action=gear(named)),
    "density of a part": lambda policy, named: LogProb(
        PARAMETERS[:2], action=("action", "steer") if named else "steer"
    ),
    "probability": lambda policy, named: Probability(LOGITS, gear(named)),
    "computed": lambda policy, named: Computed(lambda outputs, _: outputs["params", "steer", "loc"].sum(-1)),
}


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("shape", [(), (4,), (2, 3)])
@pytest.mark.parametrize("target", TARGETS)
def test_every_target(target, shape, named):
    policy = actor(named)
    explained = LRP("epsilon", target=TARGETS[target](policy, named), ledger=True).wrap(policy)
    assert explained.in_keys == ["observation"]
    td = explained(batch(*shape))
    assert td["attr", "observation"].shape == (*shape, 5)
    assert td["ledger", "gap"].abs().max() < 1e-5
    again = explained(td)  # over what the call before has written, which is no input
    assert set(again["attr"].keys()) == {"observation"}


@pytest.mark.usefixtures("aggregate")
@pytest.mark.parametrize("return_log_prob", [True, False])
def test_values_are_those_of_the_distribution(return_log_prob):
    policy = actor(return_log_prob=return_log_prob)
    td = batch(4)
    LRP("epsilon", target=LogProb.of(policy)).wrap(policy)(td)
    LRP("epsilon", target=Entropy.of(policy)).wrap(policy)(other := batch(4))
    parts = [PARTS[name](**td["params", name]) for name in ("steer", "gear")]
    steer, chosen = td["action", "steer"], td["action", "gear"]
    expected = parts[0].log_prob(steer).sum(-1) + parts[1].log_prob(chosen)
    torch.testing.assert_close(td["log_prob"], expected)
    torch.testing.assert_close(other["entropy"], parts[0].entropy().sum(-1) + parts[1].entropy())


def test_the_gradient_of_the_log_probability():
    policy, td = actor(), batch(4)
    Gradient(target=LogProb.of(policy), signed=True).wrap(policy)(td)
    x = td["observation"].clone().requires_grad_()
    loc, scale, logits = policy[0].module(x)
    value = distributions.Normal(loc, scale).log_prob(td["action", "steer"]).sum(-1)
    value = value + distributions.Categorical(logits=logits).log_prob(td["action", "gear"])
    (expected,) = torch.autograd.grad(value.sum(), x)
    torch.testing.assert_close(td["attr", "observation"], expected)


@pytest.mark.parametrize("named", [True, False])
def test_the_action_stays_while_inputs_change(named):
    """On the way from a baseline the probability is that of the action that was drawn first."""
    policy, td = actor(named), batch(4)
    IntegratedGradients(target=LogProb.of(policy), steps=64).wrap(policy)(td)
    start = TensorDict({"observation": torch.zeros(4, 5)}, [4])
    policy[0](start)
    steer, chosen = (td.get(NAMES[name] if named else name) for name in ("steer", "gear"))
    parts = [PARTS[name](**start["params", name]) for name in ("steer", "gear")]
    at_start = parts[0].log_prob(steer).sum(-1) + parts[1].log_prob(chosen)
    total = td["attr", "observation"].sum(-1)
    torch.testing.assert_close(total, td["log_prob"] - at_start, rtol=1e-3, atol=1e-3)


def test_what_is_chosen_without_chance():
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        policy = actor()
        td = LRP("epsilon", target=("action", "steer"), ledger=True).wrap(policy)(batch(4))
    assert torch.equal(td["action", "steer"], td["params", "steer", "loc"])
    assert td["attr", "observation"].abs().sum() > 0 and td["ledger", "gap"].abs().max() < 1e-5


def test_at_a_step():
    policy = actor()
    td = LRP("epsilon", target=AtStep(LogProb.of(policy), -1)).wrap(policy)(batch(2, 3))
    assert td["attr", "observation"][:, :-1].abs().sum() == 0 < td["attr", "observation"][:, -1].abs().sum()


def test_entries_that_are_tensordicts_are_named():
    policy = actor()
    for target, error, text in (
        (
            "params",
            TypeError,
            "the target 'params' is a TensorDict; name one of its entries: .*'gear', 'logits'",
        ),
        (
            Target(LOGITS, "action"),
            ValueError,
            r"entry 'action' is a TensorDict, and the index of .* is one tensor; name one of its entries, "
            r"index=Key\(...\): .*'gear'",
        ),
        (Entropy("params"), TypeError, "Entropy is computed from one tensor, and 'params' is a TensorDict"),
    ):
        with pytest.raises(error, match=text):
            LRP("epsilon", target=target).wrap(policy)(batch(4))


def test_a_part_that_no_entry_is_given_for():
    policy = actor()
    with pytest.raises(KeyError, match=r"the distribution draws .*'gear'.*, of which action= gives no entry"):
        LRP("epsilon", target=LogProb.of(policy, action=("action", "steer"))).wrap(policy)(batch(4))
