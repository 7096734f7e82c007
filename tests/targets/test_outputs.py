"""What is explained: every kind of index, contrasts, callables, in both flows."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn

from tdhook import LRP, Contrast, Key, Target
from tdhook.models.families import Linear
from tdhook.rules import EpsilonRule, LayerNormRule, PassRule

EXACT = [(Linear, EpsilonRule(1e-12)), (nn.ReLU, PassRule())]


@pytest.fixture
def model():
    net = nn.Sequential(nn.Linear(3, 8, bias=False), nn.ReLU(), nn.Linear(8, 4, bias=False)).double()
    return TensorDictModule(net, ["obs"], ["value"])


def relevance_of(model, td, weight):
    """For a bias-free ReLU network, epsilon with a vanishing epsilon is gradient times input."""
    x = td["obs"].clone().requires_grad_()
    z = model.module(x)
    (g,) = torch.autograd.grad((weight(z.detach()) * z).sum(), x)
    return (x * g).detach()


def observation(*batch, **entries):
    return TensorDict(obs=torch.randn(*batch, 3).double(), **entries, batch_size=batch)


def one_hot(index, n=4):
    return torch.nn.functional.one_hot(torch.as_tensor(index), n)


def explain(model, td, target, composite=EXACT):
    with LRP(composite, target=target).prepare(model) as explained:
        return explained(td)


BATCHES = pytest.mark.parametrize("batch", [(), (5,), (2, 5), (2, 5, 3)], ids=str)


@BATCHES
def test_all_of_an_output_by_default(model, batch):
    for target in (None, "value", Target("value"), Target("value", None)):
        td = explain(model, observation(*batch), target)
        torch.testing.assert_close(td["attr", "obs"], relevance_of(model, td, torch.ones_like))
        torch.testing.assert_close(td["attr", "obs"].sum(-1), td["value"].sum(-1))


@BATCHES
@pytest.mark.parametrize("index", [0, 3, -1, (2,)], ids=str)
def test_an_integer(model, batch, index):
    td = explain(model, observation(*batch), Target("value", index))
    i = index[0] if isinstance(index, tuple) else index
    torch.testing.assert_close(td["attr", "obs"].sum(-1), td["value"][..., i])
    torch.testing.assert_close(
        td["attr", "obs"], relevance_of(model, td, lambda z: one_hot(i % 4).expand_as(z))
    )


@BATCHES
def test_argmax(model, batch):
    td = explain(model, observation(*batch), Target("value", "argmax"))
    torch.testing.assert_close(td["attr", "obs"].sum(-1), td["value"].max(-1).values)


@BATCHES
@pytest.mark.parametrize(
    "form", ["one-hot", "one-hot bool", "one-hot float", "categorical", "categorical column"]
)
def test_an_entry_one_hot_or_categorical(model, batch, form):
    index = torch.randint(4, batch)
    entry = {
        "one-hot": one_hot(index),
        "one-hot bool": one_hot(index).bool(),
        "one-hot float": one_hot(index).float(),
        "categorical": index,
        "categorical column": index.unsqueeze(-1),
    }[form]
    plain = observation(*batch, action=entry, greedy=entry, agents={"action": entry})
    targets = [
        Target("value", "action"),
        Target("value", Key("greedy")),
        Target("value", ("agents", "action")),
        Target("value", Key(("agents", "action"))),
        Target("value", entry),
    ]
    for target in targets:
        td = explain(model, plain.clone(), target)
        torch.testing.assert_close(td["attr", "obs"], relevance_of(model, td, lambda z: one_hot(index)))


@BATCHES
def test_each_output_separately(model, batch):
    td = explain(model, observation(*batch), Target("value", "all"))
    each = td["attr", "obs"]
    assert each.shape == (*batch, 4, 3)
    for i in range(4):
        torch.testing.assert_close(
            each[..., i, :], relevance_of(model, td, lambda z, i=i: one_hot(i).expand_as(z))
        )


@BATCHES
def test_contrast(model, batch):
    index = torch.randint(4, batch)
    td = explain(
        model,
        observation(*batch, action=index),
        Contrast(Target("value", "argmax"), Target("value", "action")),
    )
    z = td["value"]
    expected = z.max(-1).values - z.gather(-1, index.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(td["attr", "obs"].sum(-1), expected)
    same = explain(model, observation(*batch), Contrast(Target("value", 1), Target("value", 1)))
    assert not same["attr", "obs"].any()


@BATCHES
def test_a_callable(model, batch):
    def advantage(outputs, inputs):
        assert outputs.batch_size == inputs.batch_size == torch.Size(batch)
        z = outputs["value"]
        return TensorDict(
            value=(z - z.mean(-1, keepdim=True)) * inputs["scale"], batch_size=outputs.batch_size
        )

    td = explain(model, observation(*batch, scale=torch.rand(*batch, 1).double()), advantage)
    z = td["value"]
    r = (z - z.mean(-1, keepdim=True)) * td["scale"]
    torch.testing.assert_close(td["attr", "obs"].sum(-1), r.sum(-1))
    torch.testing.assert_close(td["attr", "obs"], relevance_of(model, td, lambda z: r / z))


def test_two_outputs_at_once():
    model = TensorDictSequential(
        TensorDictModule(nn.Linear(3, 2, bias=False).double(), ["obs"], [("heads", "a")]),
        TensorDictModule(nn.Linear(3, 1, bias=False).double(), ["obs"], [("heads", "b")]),
    )
    target = Contrast(Target(("heads", "a"), 1), Target(("heads", "b")))
    td = explain(model, observation(5), target)
    torch.testing.assert_close(td["attr", "obs"].sum(-1), td["heads", "a"][:, 1] - td["heads", "b"][:, 0])
    with pytest.raises(
        ValueError, match=r"which output is to be explained\? Give target=Target\(key\); .*'a'.*'b'"
    ):
        explain(model, observation(5), None)


def test_an_output_of_several_axes():
    """A distribution over atoms for each action: an index is of the last axis, a tuple of the last ones."""
    net = nn.Sequential(nn.Linear(3, 10, bias=False), nn.Unflatten(-1, (2, 5))).double()
    model = TensorDictModule(net, ["obs"], ["value"])
    td = explain(model, observation(7), Target("value", (1, 3)))
    torch.testing.assert_close(td["attr", "obs"].sum(-1), td["value"][:, 1, 3])
    td = explain(model, observation(7), Target("value", 3))
    torch.testing.assert_close(td["attr", "obs"].sum(-1), td["value"][:, :, 3].sum(-1))
    td = explain(model, observation(7), Target("value", "all"))
    assert td["attr", "obs"].shape == (7, 10, 3)
    torch.testing.assert_close(td["attr", "obs"].sum(-1), td["value"].flatten(1))


def test_one_value_per_batch_element():
    net = nn.Sequential(nn.Linear(3, 1, bias=False), nn.Flatten(-2)).double()
    model = TensorDictModule(lambda x: net[0](x).squeeze(-1), ["obs"], ["value"])
    td = explain(
        TensorDictModule(nn.Linear(3, 1, bias=False).double(), ["obs"], ["value"]), observation(5), None
    )
    torch.testing.assert_close(td["attr", "obs"].sum(-1, keepdim=True), td["value"])

    class Scalar(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = net[0]

        def forward(self, x):
            return self.fc(x).squeeze(-1)

    model = TensorDictModule(Scalar(), ["obs"], ["value"])
    for batch in ((), (5,)):
        td = explain(model, observation(*batch), Target("value"))
        torch.testing.assert_close(td["attr", "obs"].sum(-1), td["value"])
        with pytest.raises(
            IndexError,
            match=r"the target 'value' of shape .* has one value per batch element; use index=None",
        ):
            explain(model, observation(*batch), Target("value", 0))


# --- Flows ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target",
    [
        Target("value"),
        Target("value", 2),
        Target("value", "argmax"),
        Target("value", "all"),
        Contrast(Target("value", 0), Target("value", "argmax")),
        lambda outputs, inputs: outputs.select("value") ** 2,
    ],
    ids=["whole", "int", "argmax", "all", "contrast", "callable"],
)
@pytest.mark.parametrize("batch", [(), (2, 5)], ids=str)
def test_both_flows_agree_on_every_target(target, batch):
    net = nn.Sequential(
        nn.Linear(3, 6, bias=False), nn.LayerNorm(6, bias=False), nn.ReLU(), nn.Linear(6, 4, bias=False)
    )
    model = TensorDictModule(net.double(), ["obs"], ["value"])
    composite = [(nn.LayerNorm, LayerNormRule()), *EXACT]
    td, results = observation(*batch), []
    for flow in ("relevance", "gradient"):
        with LRP(composite, target=target, flow=flow).prepare(model) as explained:
            results.append(explained(td.clone())["attr", "obs"])
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-9)


# --- What is wrong with a target ------------------------------------------------------------------


def test_arguments_are_checked_at_once():
    with pytest.raises(
        ValueError, match=r"index='greedy' is none of 'argmax', 'action', 'all'; .* write Key\('greedy'\)"
    ):
        Target("value", "greedy")
    for index in (True, 1.5, {1, 2}, [1, 2.5]):
        with pytest.raises(
            TypeError, match="index is None, an int, a string, a key or a tensor, or a list of these"
        ):
            Target("value", index)
    with pytest.raises(
        ValueError, match="a list of indices names at least one output, and this one is empty"
    ):
        Target("value", [])
    with pytest.raises(
        ValueError, match="a list names outputs one by one; for each of them, write index='all'"
    ):
        Target("value", ["all"])
    for pair in (("value", Target("value")), (Target("value"), None)):
        with pytest.raises(TypeError, match="Contrast compares two targets, got"):
            Contrast(*pair)
    with pytest.raises(
        TypeError, match="Contrast compares one output with one or with several, got several twice"
    ):
        Contrast(Target("value", "all"), Target("value", [0, 1]))
    with pytest.raises(TypeError, match="a target is a Target, a Contrast, a key or a callable, got int"):
        LRP("epsilon_plus", target=5)
    with pytest.raises(TypeError, match="a target or init_attr_targets, not both"):
        LRP("epsilon_plus", target="value", init_attr_targets=lambda targets, extra: targets)


@pytest.mark.parametrize(
    "target, error, text",
    [
        (Target("q"), KeyError, "the target names 'q', which the module did not write; it has code, value"),
        (
            Target("value", 4),
            IndexError,
            r"target index 4 is out of range for 'value', which has 4 outputs \(shape \(5, 4\)",
        ),
        (Target("value", -5), IndexError, "target index -5 is out of range for 'value'"),
        (
            Target("value", (1, 2, 3)),
            IndexError,
            "target index 1 is out of range for 'value', which has no such axis",
        ),
        (
            Target("value", "action"),
            KeyError,
            "takes its index from 'action', which is not there; there are .*obs",
        ),
        (
            Target("value", Key("off")),
            IndexError,
            "target index 7 from entry 'off' is out of range for 'value'",
        ),
        (
            Target("value", Key("two")),
            ValueError,
            "has the shape of 'value' but is not one-hot along the last axis",
        ),
        (
            Target("value", Key("real")),
            TypeError,
            "is continuous: it picks no output of 'value'; use index=None",
        ),
        (
            Target("value", Key("odd")),
            ValueError,
            "is neither one index per batch element nor one-hot for 'value'",
        ),
        (
            Target("value", Key("half")),
            TypeError,
            r"dtype torch.float64 and shape \(5,\) is no index of 'value'",
        ),
        (
            Target("code"),
            TypeError,
            "the target 'code' is torch.int64; only floating-point outputs can be explained",
        ),
        (Contrast(Target("value"), Target("q")), KeyError, "the target names 'q'"),
        (
            lambda outputs, inputs: outputs["value"],
            TypeError,
            "a target function returns a TensorDict of relevance",
        ),
        (
            lambda outputs, inputs: TensorDict(value=torch.ones(5, 3)),
            ValueError,
            r"relevance of shape \(5, 3\) for 'value'",
        ),
        (lambda outputs, inputs: TensorDict(q=torch.ones(5, 4)), KeyError, "the target names 'q'"),
    ],
)
def test_targets_that_do_not_fit(model, target, error, text):
    model = TensorDictSequential(model, TensorDictModule(lambda z: z.argmax(-1), ["value"], ["code"]))
    entries = {
        "off": torch.tensor([0, 1, 7, 2, 3]),
        "two": torch.ones(5, 4),
        "real": torch.rand(5, 4),
        "odd": torch.zeros(5, 3).long(),
    }
    with pytest.raises(error, match=text):
        explain(model, observation(5, half=torch.rand(5).double(), **entries), target)


def test_targets_are_values():
    assert Target("value", 1) == Target("value", 1) and hash(Target("value", 1)) == hash(Target("value", 1))
    assert Target("value", 1) != Target("value", 2) and Target("value", None) != Target("value", 0)
    assert Target("value", torch.tensor([1, 2])) == Target("value", torch.tensor([1, 2]))
    assert Target("value", torch.tensor([1, 2])) != Target("value", torch.tensor([1, 3]))
    assert Target("value", torch.tensor(1)) != Target("value", 1)
    assert Target(("value",)) == Target("value") and Key(("a",)) == Key("a")
    assert Contrast(Target("v", 0), Target("v", 1)) == Contrast(Target("v", 0), Target("v", 1))
    assert repr(Target("value", "argmax")) == "Target(key='value', index='argmax')"


# --- Layers of fixed rank -------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [(), (4,), (2, 3)], ids=str)
@pytest.mark.parametrize("kind", ["int", "action", "tensor", "one-hot tensor", "all", "contrast", "callable"])
def test_targets_of_a_convolutional_network(batch, kind):
    """Its layers take one batch axis; indices still come in the shape of the batch."""
    net = nn.Sequential(
        nn.Conv2d(1, 2, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(8, 4, bias=False)
    ).double()
    model = TensorDictModule(net, ["pixels"], ["value"])
    index = torch.randint(4, batch)
    td = TensorDict(pixels=torch.rand(*batch, 1, 4, 4).double(), action=index, batch_size=batch)
    target = {
        "int": Target("value", 1),
        "action": Target("value", "action"),
        "tensor": Target("value", index),
        "one-hot tensor": Target("value", one_hot(index)),
        "all": Target("value", "all"),
        "contrast": Contrast(Target("value", index), Target("value", 0)),
        "callable": lambda outputs, inputs: TensorDict(
            value=outputs["value"] * one_hot(index), batch_size=batch
        ),
    }[kind]
    td = explain(model, td, target)
    z = td["value"]
    assert z.shape == (*batch, 4)
    chosen = z.gather(-1, index.unsqueeze(-1)).squeeze(-1)
    expected = {"int": z[..., 1], "all": z, "contrast": chosen - z[..., 0]}.get(kind, chosen)
    assert td["attr", "pixels"].shape == (*batch, *((4,) if kind == "all" else ()), 1, 4, 4)
    torch.testing.assert_close(td["attr", "pixels"].sum((-1, -2, -3)), expected)
