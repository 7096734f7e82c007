"""Batch norm's backward pass reads gradients as they are, however they and what it was given lie in memory."""

from __future__ import annotations

import copy
from itertools import permutations

import pytest
import torch
import torch.nn.functional as F
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torch.utils.checkpoint import checkpoint

from tdhook import LRP, Target
from tdhook.attribution import GradientTimesInput, IntegratedGradients
from tdhook.passes.backward import PullBack
from tdhook.rules import EpsilonRule
from tdhook.tape.layouts import lay_out
from tdhook.targets import Seeds

SHAPES = [
    (2, 3, 4, 5),
    (2, 3, 4, 1),
    (1, 3, 4, 5),
    (1, 3, 1, 5),
    (2, 3, 1, 1),
    (1, 1, 4, 5),
    (2, 3, 4),
    (2, 3),
]


def laid(shape, order):
    """Numbers of a shape whose axes lie in memory in some order."""
    back = [order.index(axis) for axis in range(len(shape))]
    return torch.randn([shape[axis] for axis in order], dtype=torch.float64).permute(back)


def normalised(x, kind, weight, bias, mean, variance):
    shape = [1, -1] + [1] * (x.dim() - 2)
    if kind != "evaluation":
        over = [axis for axis in range(x.dim()) if axis != 1 and (kind == "training" or axis != 0)]
        mean, variance = x.mean(over, keepdim=True), x.var(over, keepdim=True, unbiased=False)
    else:
        mean, variance = mean.view(shape), variance.view(shape)
    return (x - mean) / torch.sqrt(variance + 1e-5) * weight.view(shape) + bias.view(shape)


@pytest.mark.parametrize("kind", ["evaluation", "training", "instance"])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_those_of_the_formula(shape, kind):
    torch.manual_seed(0)
    weight, bias, mean, variance = torch.rand(4, shape[1], dtype=torch.float64) + 0.5
    norm = {
        "evaluation": lambda x: F.batch_norm(x, mean, variance, weight, bias),
        "training": lambda x: F.batch_norm(x, None, None, weight, bias, training=True),
        "instance": lambda x: F.instance_norm(x, None, None, weight, bias),
    }[kind]
    if kind == "instance" and (len(shape) < 3 or shape[2:] == (1, 1)):
        pytest.skip("there is nothing to normalise over")
    orders = list(permutations(range(len(shape))))
    for of_input in orders:
        for of_gradient in orders:
            x, grad = laid(shape, of_input).requires_grad_(), laid(shape, of_gradient)
            z = norm(x)
            assert lay_out([z.grad_fn]) and lay_out([z.grad_fn])  # the second time there is nothing to do
            (found,) = torch.autograd.grad(z, x, grad)
            same = x.detach().requires_grad_()
            (expected,) = torch.autograd.grad(
                normalised(same, kind, weight, bias, mean, variance), same, grad
            )
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_nothing_is_said_where_there_is_no_batch_norm():
    x = torch.randn(2, 3, requires_grad=True)
    assert not lay_out([F.layer_norm(x, (3,)).relu().grad_fn])


def test_passes_from_behind_a_norm_do_not_end_the_search():
    torch.manual_seed(0)
    pull_back = PullBack()
    x = torch.randn(5, 4, 3, dtype=torch.float64).permute(2, 0, 1).unsqueeze(0).requires_grad_()
    norm = norm_of(3).double().eval()
    expected = (norm.weight / (norm.running_var + norm.eps).sqrt()).view(1, 3, 1, 1).expand_as(x)
    for _ in range(2):
        h = 2 * x
        z = norm(h)
        grad = torch.randn(1, 3, 5, 4, dtype=torch.float64)
        found = pull_back(Seeds(["z"], [z], [grad]), [x], keep=True)[0]
        torch.testing.assert_close(found, 2 * expected * grad)
        pull_back(Seeds(["h"], [h], [torch.ones_like(h)]), [x])  # a part of the tape, without the norm


def norm_of(channels):
    norm = nn.BatchNorm2d(channels)
    for tensor in (norm.running_mean, norm.bias.data):
        tensor.normal_()
    for tensor in (norm.running_var, norm.weight.data):
        tensor.uniform_(0.5, 2)
    return norm


class Frames(nn.Module):
    """A picture whose channels come last, as environments have them, alone in its batch."""

    def __init__(self):
        super().__init__()
        self.norm, self.head = norm_of(3), nn.Linear(3 * 5 * 4, 2)

    def forward(self, x):
        return self.head(self.norm(x).flatten(1))

    @staticmethod
    def given():
        return torch.randn(5, 4, 3, dtype=torch.float64).permute(2, 0, 1).unsqueeze(0)


class Sound(nn.Module):
    """Spectrograms that are normalised by frequency, moved there and back."""

    def __init__(self):
        super().__init__()
        self.norm, self.head = norm_of(4), nn.Linear(5 * 4, 2)

    def forward(self, x):
        return self.head(self.norm(x.transpose(1, 3)).transpose(1, 3).reshape(len(x), -1))

    @staticmethod
    def given():
        return torch.randn(2, 1, 5, 4, dtype=torch.float64)


class Checkpointed(Frames):
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


class CheckpointedSound(Sound):
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


def with_a_convolution(model):
    """The same, whose norm is a convolution that does the same."""
    norm = model.norm
    same = copy.deepcopy(model)
    same.norm = nn.Conv2d(norm.num_features, norm.num_features, 1, groups=norm.num_features).double()
    with torch.no_grad():
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        same.norm.weight.copy_(scale[:, None, None, None])
        same.norm.bias.copy_(norm.bias - norm.running_mean * scale)
    return same


METHODS = {
    "gradient x input": GradientTimesInput,
    "integrated gradients": lambda target: IntegratedGradients(target, steps=5),
    "against a baseline": lambda target: LRP("deeplift", target=target, baseline=0.3),
    "attn_lrp, relevance": lambda target: LRP("attn_lrp", target=target, flow="relevance"),
    "attn_lrp, gradient": lambda target: LRP("attn_lrp", target=target, flow="gradient"),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("index", [0, "all"])
@pytest.mark.parametrize("make", [Frames, Sound, Checkpointed, CheckpointedSound])
def test_relevance_does_not_depend_on_how_inputs_lie_in_memory(make, index, name):
    torch.manual_seed(0)
    model = make().double().eval()
    td = TensorDict(x=model.given(), batch_size=[len(model.given())])
    plain = with_a_convolution(model)
    torch.testing.assert_close(model(td["x"]), plain(td["x"]))
    if make in (Checkpointed, CheckpointedSound):
        plain.forward = super(make, plain).forward
    found, expected = (
        METHODS[name](Target("y", index)).wrap(TensorDictModule(one, ["x"], ["y"]))(td.copy())["attr", "x"]
        for one in (model, plain)
    )
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_a_norm_inside_a_block_with_a_rule():
    torch.manual_seed(0)
    block = nn.Sequential(norm_of(3), nn.ReLU())
    model = nn.Sequential(block, nn.Flatten(), nn.Linear(60, 2)).double().eval()
    x = torch.randn(5, 4, 3, dtype=torch.float64).permute(2, 0, 1).unsqueeze(0)
    explained = LRP([("0", EpsilonRule(1e-9)), (nn.Linear, EpsilonRule(1e-9))], target=Target("y", 0)).wrap(
        TensorDictModule(model, ["x"], ["y"])
    )
    found = explained(TensorDict(x=x, batch_size=[1]))["attr", "x"]
    same = explained(TensorDict(x=torch.cat([x, x]).contiguous(), batch_size=[2]))["attr", "x"]
    torch.testing.assert_close(found, same[:1], rtol=1e-9, atol=1e-9)
