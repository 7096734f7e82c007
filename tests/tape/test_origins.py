"""What made a value is read from the tape: gates, denominators, and values that cannot be negative."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict
from torch import nn

from tdhook import LRP, Target
from tdhook.relevance.propagation.call import Call
from tdhook.relevance.propagation.conversions import Damped, Ratio, TimesValue, Unchanged
from tdhook.rules import PassRule, ZPlusRule
from tdhook.tape.origins import is_nonnegative, made_by


@torch.no_grad()
def _less(x):
    return x.sub_(1)


STEPS = {
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
    "exp": lambda x: x.clamp(max=5).exp(),
    "abs": torch.abs,
    "softmax": lambda x: x.softmax(-1),
    "tanh": torch.tanh,
    "negative": torch.neg,
    "minus one": lambda x: x - 1,
    "one minus": lambda x: 1 - x,
    "times minus two": lambda x: -2 * x,
    "linear": lambda x: F.linear(x, torch.linspace(-1, 1, 64).view(8, 8)),
    "normalised": lambda x: F.layer_norm(x, (8,)),
    "moved": lambda x: x.flatten().view(4, 1, 8).transpose(0, 1).squeeze(0),
    "split": lambda x: torch.cat(x.chunk(2, -1), -1),
    "max pool": lambda x: F.max_pool1d(x, 3, 1, 1),
    "average": lambda x: F.avg_pool1d(x, 3, 1, 1),
    "sum": lambda x: x.sum(-1, keepdim=True).expand(4, 8),
    "upsampled": lambda x: F.interpolate(x[None], scale_factor=2.0)[0, :, ::2],
    "bicubic": lambda x: F.interpolate(x[None, None], scale_factor=2.0, mode="bicubic")[0, 0, ::2, ::2],
    "row put in": lambda x: torch.select_scatter(x, torch.full((8,), -1.0), 0, 1),
    "rows put in": lambda x: torch.slice_scatter(x, torch.full((2, 8), -1.0), 0, 1, 3),
    "written to": lambda x: _less(x * 1),
    "two": lambda x: torch.stack([x, -x]).amax(0) - 1,
    "times value": TimesValue.apply,
    "damped": lambda x: Damped.apply(x, 1e-6),
    "passed": lambda x: Unchanged.apply(x, torch.relu, "ReLU"),
    "ratio": lambda x: Ratio.apply(x, torch.sigmoid, "Sigmoid"),
    "passed tanh": lambda x: Unchanged.apply(x, torch.tanh, "Tanh"),
}


@given(st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=6))
def test_what_is_said_to_be_nonnegative_is(names):
    torch.manual_seed(0)
    x = torch.randn(4, 8, requires_grad=True)
    for name in names:
        x = STEPS[name](x)
    if is_nonnegative(x):
        assert x.min() >= 0


@pytest.mark.parametrize("name", ["relu", "sigmoid", "softplus", "exp", "abs", "softmax", "passed", "ratio"])
@pytest.mark.parametrize("then", ["moved", "max pool", "average", "times value", "damped", "upsampled"])
def test_it_is_known_behind_what_keeps_the_sign(name, then):
    x = torch.randn(4, 8, requires_grad=True)
    assert is_nonnegative(STEPS[name](x))
    assert is_nonnegative(STEPS[then](STEPS[name](x)))
    assert not is_nonnegative(STEPS[then](x))
    assert not is_nonnegative(STEPS["minus one"](STEPS[name](x)))


@pytest.mark.parametrize("name", ["ReLU", "Softplus", "Sigmoid"])
@pytest.mark.parametrize("flow", ["relevance", "gradient"])
def test_a_class_that_is_called_like_one_of_torch_is_another(name, flow):
    """z-plus behind it is that of any other class that computes the same."""

    def model(kind):
        torch.manual_seed(0)
        made = type(kind, (nn.Module,), {"forward": lambda self, x: torch.sigmoid(x) - 0.5})()
        return nn.Sequential(nn.Linear(5, 6), made, nn.Linear(6, 2)).double()

    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).double()
    found = []
    for kind in (name, "Centred"):
        lrp = LRP([(kind, PassRule()), (nn.Linear, ZPlusRule())], target=Target("output", 0), flow=flow)
        with lrp.prepare(model(kind)) as explained:
            found.append(explained(TensorDict({"input": x}, [3]))["attr", "input"])
    torch.testing.assert_close(*found)


def test_a_gate_is_one_whoever_wrote_it():
    made = type("Sigmoid", (nn.Module,), {"forward": lambda self, x: x.sigmoid()})()
    x = torch.randn(4, 8, requires_grad=True)
    y = PassRule().bound(made, "gradient")(Call(made, made.forward, (x,), {}))
    assert made_by(1 - y, frozenset(["sigmoid"])) and not is_nonnegative(y)


def test_it_is_known_under_vmap():
    found = []

    def function(x):
        y = PassRule().bound(nn.ReLU(), "relevance")(Call(nn.ReLU(), torch.relu, (x,), {}))
        found.extend([is_nonnegative(x), is_nonnegative(y)])
        return y

    torch.vmap(function)(torch.randn(3, 4, requires_grad=True))
    assert found == [False, True]


def test_gates_are_known_by_what_made_them():
    x = torch.randn(4, 8, requires_grad=True)
    names = frozenset(["sigmoid"])
    assert made_by(1 - torch.sigmoid(x).chunk(2, -1)[0], names)
    assert made_by(Ratio.apply(x, torch.sigmoid, "Sigmoid"), names)
    assert not made_by(torch.sigmoid(x) * 2, names)
    assert not made_by(torch.tanh(x), names)


@pytest.mark.parametrize("negative, products", [(False, 3), (True, 5)], ids=["non-negative", "signed"])
def test_terms_that_are_zero_are_skipped(negative, products):
    """z-plus takes one more product than the gradient for inputs that are not negative, three more for others."""
    layer = nn.Conv2d(3, 4, 3)
    x = torch.rand(2, 3, 5, 5) - (0.5 if negative else 0.0)
    with torch.profiler.profile() as profile, ZPlusRule().register(layer):
        z = layer(x.requires_grad_())
        torch.autograd.grad(z, x, torch.rand_like(z))
    names = [event.name for event in profile.events()]
    assert names.count("aten::convolution") + names.count("aten::convolution_backward") == products


def test_nothing_is_looked_at_behind_a_relu():
    """What the tape knows need not be found out, for which a GPU would have to be waited for."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 1), nn.Flatten())
    explained = LRP("epsilon_plus", target=Target("output", 0)).wrap(net)
    td = TensorDict({"input": torch.rand(2, 3, 5, 5)}, batch_size=[2])
    explained(td)
    with torch.profiler.profile() as profile:
        explained(td)
    assert [event.name for event in profile.events()].count("aten::amin") == 1  # of the model's own input


@pytest.mark.parametrize("negative, products", [(False, 6), (True, 8)], ids=["non-negative", "signed"])
def test_a_graph_skips_terms_that_are_zero(negative, products):
    """It is made for inputs of which none is negative, and for others another one."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 1, 3), nn.Flatten())
    method = LRP("epsilon_plus", target=Target("output", 0), compile={"backend": "aot_eager"})
    explained = method.wrap(net)
    td = TensorDict({"input": torch.rand(2, 3, 5, 5) - (0.5 if negative else 0.0)}, batch_size=[2])
    explained(td)
    with torch.profiler.profile() as profile:
        explained(td)
    names = [event.name for event in profile.events()]
    assert names.count("aten::convolution") + names.count("aten::convolution_backward") == products
