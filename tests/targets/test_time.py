"""Targets at some steps of a sequence: which steps are explained, by which inputs, and what is said of misuse."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from tdhook import LRP, Contrast, Key, Target
from tdhook.rules import EpsilonRule
from tdhook.selectors import Op
from tdhook.targets import AtStep, Seeder

STEPS = 6
EXACT = [(Op("linear", "matmul"), EpsilonRule(1e-12))]


class Fading(nn.Module):
    """Linear memory: an output is the sum of what was seen so far, each step back worth half as much."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 2).double())
        apart = torch.arange(STEPS).unsqueeze(1) - torch.arange(STEPS)
        self.register_buffer("memory", torch.where(apart >= 0, 0.5 ** apart.clamp(min=0), 0.0).double())

    def forward(self, x):
        return torch.matmul(self.memory, nn.functional.linear(x, self.weight))


@pytest.fixture
def model():
    return TensorDictModule(Fading(), ["obs"], ["value"])


def sequences(*batch, names=None, **entries):
    return TensorDict(
        obs=torch.randn(*batch, STEPS, 2).double(), **entries, batch_size=(*batch, STEPS), names=names
    )


def explain(model, td, target, **arguments):
    with LRP(EXACT, target=target, **arguments).prepare(model) as explained:
        return explained(td.clone())


def expected(model, td, weight):
    """Relevance of each step for each step, ``[*batch, step, explained step, features]``."""
    x, w = td["obs"], model.module.weight.detach()
    per_step = torch.einsum("...sf,of,...to->...stf", x, w, weight)
    return per_step * model.module.memory.T.unsqueeze(-1)


def chosen(td, index):
    """A weight for each explained output, one of which counts."""
    return nn.functional.one_hot(torch.as_tensor(index), 3).double().expand(*td.batch_size, 3)


BATCHES = pytest.mark.parametrize("batch", [(), (4,), (2, 4)], ids=str)


@BATCHES
@pytest.mark.parametrize("step", [0, 3, -1, -2, "last"])
def test_one_step(model, batch, step):
    td = sequences(*batch)
    number = -1 if step == "last" else step
    for target, weight in (
        (Target("value", 1), chosen(td, 1)),
        (Contrast(Target("value", 0), Target("value", 2)), chosen(td, 0) - chosen(td, 2)),
        ("value", torch.ones(*td.batch_size, 3).double()),
        (None, torch.ones(*td.batch_size, 3).double()),
    ):
        found = explain(model, td, AtStep(target, step))["attr", "obs"]
        torch.testing.assert_close(found, expected(model, td, weight)[..., number, :])
    later = range(STEPS)[number] + 1
    assert not found[..., later:, :].any()


def test_the_last_step_is_the_default(model):
    assert AtStep("value") == AtStep("value", "last")
    td = sequences(3)
    one, other = (explain(model, td, t)["attr", "obs"] for t in (AtStep("value"), AtStep("value", -1)))
    assert torch.equal(one, other)


@BATCHES
def test_each_step_separately(model, batch):
    td = sequences(*batch)
    found = explain(model, td, AtStep(Target("value", 1), "all"))["attr", "obs"]
    assert found.shape == (*batch, STEPS, STEPS, 2)
    torch.testing.assert_close(found, expected(model, td, chosen(td, 1)))
    some = explain(model, td, AtStep(Target("value", 1), [4, -6]))["attr", "obs"]
    torch.testing.assert_close(some, found[..., [4, 0], :])


@BATCHES
def test_a_step_for_each_sequence(model, batch):
    td = sequences(*batch)
    steps = torch.randint(-STEPS, STEPS, batch)
    each = expected(model, td, chosen(td, 2))
    index = (steps % STEPS)[..., None, None, None].expand(*batch, STEPS, 1, 2)
    for form in (steps, steps.unsqueeze(-1)):
        found = explain(model, td, AtStep(Target("value", 2), form))["attr", "obs"]
        torch.testing.assert_close(found, each.gather(-2, index).squeeze(-2))


@BATCHES
def test_marked_steps_together(model, batch):
    marks = torch.rand(*batch, STEPS, 1) < 0.3
    td = sequences(*batch, done=marks, next={"done": marks})
    weight = chosen(td, 0)
    wanted = (expected(model, td, weight) * marks.unsqueeze(-3)).sum(-2)
    for step in (marks, marks.squeeze(-1), Key("done"), Key(("next", "done"))):
        found = explain(model, td, AtStep(Target("value", 0), step))["attr", "obs"]
        torch.testing.assert_close(found, wanted)
    if batch:
        assert not found[~marks.any(-2).squeeze(-1)].any()


def test_the_action_of_a_step(model):
    """What the inner target reads is read, too."""
    action = torch.randint(3, (4, STEPS))
    td = sequences(4, action=action, asked=torch.arange(STEPS).expand(4, STEPS) == 2)
    target = AtStep(Target("value", "action"), Key("asked"))
    assert set(target.entries) == {"action", "asked"}
    found = explain(model, td, target)["attr", "obs"]
    torch.testing.assert_close(found, expected(model, td, chosen(td, action))[..., 2, :])


def test_time_is_the_axis_of_that_name_or_the_last(model):
    class TimeFirst(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x.transpose(0, 1)).transpose(0, 1)

    plain = sequences(4)
    wanted = explain(model, plain, AtStep("value", 2))["attr", "obs"]
    first = TensorDictModule(TimeFirst(model.module), ["obs"], ["value"])
    turned = plain["obs"].transpose(0, 1)
    named = TensorDict(obs=turned, batch_size=[STEPS, 4], names=["time", None])
    found = explain(first, named, AtStep("value", 2))["attr", "obs"]
    torch.testing.assert_close(found, wanted.transpose(0, 1))
    unnamed = TensorDict(obs=turned, batch_size=[STEPS, 4])
    for axis in (0, -2):
        found = explain(first, unnamed, AtStep("value", 2, time_dim=axis))["attr", "obs"]
        torch.testing.assert_close(found, wanted.transpose(0, 1))
    steps = torch.tensor([2, 2, 2, 0])
    found = explain(first, unnamed, AtStep("value", steps, time_dim=0))["attr", "obs"]
    torch.testing.assert_close(found[:, :3], wanted.transpose(0, 1)[:, :3])


def test_several_outputs_at_one_step(model):
    td = sequences(4)
    found = explain(model, td, AtStep(Target("value", "all"), 3))["attr", "obs"]
    assert found.shape == (4, STEPS, 3, 2)
    for i in range(3):
        torch.testing.assert_close(found[..., i, :], expected(model, td, chosen(td, i))[..., 3, :])


def test_any_target_goes_inside(model):
    def advantage(outputs, inputs):
        value = outputs["value"]
        return TensorDict(value=value - value.mean(-1, keepdim=True), batch_size=outputs.batch_size)

    class Doubled(Seeder):
        def derive(self, outputs, inputs):
            return outputs.copy().set("double", 2 * outputs["value"])

        def __call__(self, outputs, inputs, flow):
            return Target("double", 0)(outputs, inputs, flow)

    td = sequences(4)
    found = explain(model, td, AtStep(advantage, 3))
    share = found["value"] - found["value"].mean(-1, keepdim=True)
    torch.testing.assert_close(found["attr", "obs"].sum((-2, -1)), share[:, 3].sum(-1))
    found = explain(model, td, AtStep(Doubled(), 3))["attr", "obs"]
    torch.testing.assert_close(found, 2 * expected(model, td, chosen(td, 0))[..., 3, :])
    assert AtStep(advantage, 3).entries is None


@pytest.mark.parametrize("flow", ["relevance", "gradient"])
@pytest.mark.parametrize("step", ["last", "all", torch.tensor([0, 3])], ids=str)
def test_the_ledger_closes_at_the_chosen_steps(model, step, flow):
    td = sequences(2)
    found = explain(model, td, AtStep(Target("value", 1), step), ledger=True, flow=flow)
    ledger = found["ledger"]
    assert ledger["gap"].abs().max() < 1e-9
    value = found["value"][..., 1]
    if isinstance(step, str) and step == "all":
        torch.testing.assert_close(ledger["target"].sum(1), value)
    else:
        marks = torch.zeros(2, STEPS).double()
        marks[[0, 1], [-1, -1] if isinstance(step, str) else step.tolist()] = 1
        torch.testing.assert_close(ledger["target"], value * marks)


def test_what_is_masked_elsewhere_may_be_infinite(model):
    class Masked(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x).masked_fill(torch.arange(STEPS).unsqueeze(-1) < 2, -torch.inf)

    td = sequences(4)
    masked = TensorDictModule(Masked(model.module), ["obs"], ["value"])
    found = explain(masked, td, AtStep(Target("value", 0), 3))["attr", "obs"]
    torch.testing.assert_close(found, expected(model, td, chosen(td, 0))[..., 3, :])


def test_targets_compare_and_print():
    steps = torch.tensor([1, 2])
    assert AtStep("value", steps) == AtStep(Target("value"), steps.clone())
    assert hash(AtStep("value", steps)) == hash(AtStep("value", steps.clone()))
    assert AtStep("value", 1) != AtStep("value", 2)
    assert AtStep("value", 1) != AtStep("value", 1, time_dim=0)
    assert AtStep("value", [1]) != AtStep("value", 1)
    assert AtStep("value", 1) != "value"
    assert repr(AtStep("value", 1)) == "AtStep(target=Target(key='value', index=None), step=1, time_dim=None)"


# --- What is wrong with a step --------------------------------------------------------------------


@pytest.mark.parametrize(
    "step, error, message",
    [
        ("first", ValueError, r"step='first' is neither 'last' nor 'all'; .* write Key\('first'\)"),
        ([], TypeError, r"a list of steps names at least one, by integers; got \[\]"),
        ([1, "last"], TypeError, "a list of steps names at least one, by integers"),
        (True, TypeError, "a step is an int, 'last', 'all', a list, a tensor or a Key, got bool"),
        (None, TypeError, "got NoneType"),
        (torch.tensor([1.0]), TypeError, "a tensor of steps holds integers or marks, got torch.float32"),
    ],
)
def test_steps_are_checked_at_once(step, error, message):
    with pytest.raises(error, match=message):
        AtStep("value", step)


@pytest.mark.parametrize(
    "target, error, message",
    [
        (
            AtStep("value", STEPS),
            IndexError,
            r"step 6 is out of range: the sequences have 6 steps \(batch size",
        ),
        (AtStep("value", [0, -7]), IndexError, "step -7 is out of range"),
        (AtStep("value", torch.tensor([0, 9])), IndexError, "step 9 is out of range"),
        (
            AtStep("value", torch.tensor([0, 1, 2])),
            ValueError,
            r"of steps, .* is of shape \[3\], and should be .*\[2\]",
        ),
        (AtStep("value", torch.ones(3).bool()), ValueError, r"marks steps is of shape \[3\], .* \[2, 6\]"),
        (
            AtStep("value", Key("asked")),
            KeyError,
            "'asked', which marks steps, is not there; there are obs, value",
        ),
        (
            AtStep("value", Key("obs")),
            TypeError,
            "'obs' marks steps by truth values, and it is torch.float64",
        ),
        (
            AtStep("value", time_dim=2),
            IndexError,
            r"time_dim=2 is no axis of the batch, which has size \[2, 6\]",
        ),
        (AtStep(Target("value", "all"), "all"), TypeError, "several outputs or several steps .* not both"),
    ],
    ids=str,
)
def test_what_does_not_fit_the_batch(model, target, error, message):
    with pytest.raises(error, match=message):
        explain(model, sequences(2), target)


def test_a_step_needs_an_axis(model):
    td = TensorDict(obs=torch.randn(STEPS, 2).double())
    with pytest.raises(
        IndexError, match=r"along an axis of the batch, and the TensorDict has batch size \[\]"
    ):
        explain(model, td, AtStep("value"))
