"""A batch norm behind a layer is merged into it: the pair is explained as the one layer that it amounts to."""

from __future__ import annotations

import copy

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from tdhook.attribution import LRP
from tdhook.composites import Composite
from tdhook.models.families import Activation, BatchNorm, Linear
from tdhook.rules import (
    AlphaBetaRule,
    EpsilonRule,
    FlatRule,
    GammaRule,
    PassRule,
    WSquareRule,
    ZBoxRule,
    ZPlusRule,
)
from tdhook.selectors import Type
from tdhook.targets import Target

from .checks import assert_close
from .layers import DTYPE, draw

RULES = [
    EpsilonRule(),
    EpsilonRule(zero_params="bias"),
    GammaRule(),
    AlphaBetaRule(),
    ZPlusRule(),
    ZBoxRule(-3.0, 3.0),
    WSquareRule(),
    FlatRule(),
]

LAYERS = {
    "linear": (lambda bias: nn.Linear(4, 3, bias=bias), nn.BatchNorm1d, (4,)),
    "conv1d": (lambda bias: nn.Conv1d(2, 3, 2, padding=1, bias=bias), nn.BatchNorm1d, (2, 5)),
    "conv2d": (
        lambda bias: nn.Conv2d(2, 4, 3, stride=2, groups=2, padding=1, padding_mode="circular", bias=bias),
        nn.BatchNorm2d,
        (2, 4, 5),
    ),
    "conv3d": (lambda bias: nn.Conv3d(1, 2, 2, bias=bias), nn.BatchNorm3d, (1, 3, 2, 3)),
    "transpose1d": (
        lambda bias: nn.ConvTranspose1d(4, 3, 2, stride=2, output_padding=1, bias=bias),
        nn.BatchNorm1d,
        (4, 3),
    ),
    "transpose1d_groups": (
        lambda bias: nn.ConvTranspose1d(4, 6, 2, groups=2, bias=bias),
        nn.BatchNorm1d,
        (4, 3),
    ),
    "transpose2d": (lambda bias: nn.ConvTranspose2d(3, 2, 2, bias=bias), nn.BatchNorm2d, (3, 2, 2)),
}


def pair(factory, norm, bias, affine):
    torch.manual_seed(0)
    layer = factory(bias)
    channels = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    norm = norm(channels, affine=affine)
    with torch.no_grad():
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.2, 3.0)
        if affine:
            norm.weight.normal_()  # a negative scale swaps what is positive and what is negative
            norm.bias.normal_()
    return layer.to(DTYPE).eval(), norm.to(DTYPE).eval()


def fused(layer, norm):
    """The one layer, weight by weight: each belongs to an output channel, whose scale it takes."""
    scale = (norm.running_var + norm.eps).rsqrt() * (norm.weight if norm.affine else 1.0)
    shift = (norm.bias if norm.affine else 0.0) - norm.running_mean * scale
    merged = copy.deepcopy(layer)
    with torch.no_grad():
        if getattr(layer, "transposed", False):  # [inputs, outputs of the input's group, *kernel]
            per_group = layer.out_channels // layer.groups
            for i in range(layer.in_channels):
                group = i // (layer.in_channels // layer.groups)
                for o in range(per_group):
                    merged.weight[i, o] *= scale[group * per_group + o]
        else:
            for o in range(len(scale)):
                merged.weight[o] *= scale[o]
        merged.bias = nn.Parameter(shift + (layer.bias * scale if layer.bias is not None else 0.0))
    return merged


def explain(network, rule, x):
    rules = Composite([(Type(Linear), rule), (Type(Activation) | Type(BatchNorm), PassRule())])
    with LRP(rules, target=Target("output")).prepare(network) as explained:
        td = explained(TensorDict({"input": x}, batch_size=x.shape[:1]))
    return td["output"], td["attr", "input"]


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("factory, norm, shape", LAYERS.values(), ids=LAYERS)
def test_equals_the_fused_layer(factory, norm, shape, rule, bias, affine):
    layer, norm = pair(factory, norm, bias, affine)
    x = draw(2, *shape)
    with torch.no_grad():
        merged = fused(layer, norm)
        assert_close(merged(x), norm(layer(x)))
        own = torch.tanh(norm(layer(x)))
    output, actual = explain(nn.Sequential(layer, norm, nn.Tanh()), rule, x)
    _, expected = explain(nn.Sequential(merged, nn.Tanh()), rule, x)
    assert torch.equal(output, own), "the model itself is not touched"
    assert_close(actual, expected)


def test_a_batch_norm_of_another_axis_is_not_merged():
    """Over [N, C, L] batch norm scales axis 1, and a linear layer made the last one, also if both are as long."""
    torch.manual_seed(0)
    layer, norm = pair(lambda bias: nn.Linear(4, 3, bias=bias), nn.BatchNorm1d, False, False)
    norm.running_mean.zero_()
    x = draw(2, 3, 4)
    output, attr = explain(nn.Sequential(layer, norm), EpsilonRule(1e-14), x)
    assert_close(attr.sum((1, 2)), output.sum((1, 2)))


class Residual(nn.Module):
    """A batch norm behind a sum, as a module or as the function that it calls, whose input is zero at times."""

    def __init__(self, function: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.function = function
        with torch.no_grad():
            self.norm.running_mean.normal_()
            self.norm.bias.normal_()

    def forward(self, x):
        x = self.first(x).relu() + self.first(-x).relu() * (x[:, :1] > 0)
        if self.function:
            norm = self.norm
            return self.last(
                nn.functional.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias)
            )
        return self.last(self.norm(x))


@pytest.mark.parametrize("preset", ["attn_lrp", "cp_lrp"])
def test_the_presets_of_transformers_see_a_weighted_sum_wherever_it_stands(preset):
    """Module and function are the same, and so are the flows, though what goes in is zero at times."""
    found, x = [], draw(16, 4)
    for function in (False, True):
        model = Residual(function).to(DTYPE).eval()
        for flow in ("relevance", "gradient"):
            with LRP(preset, target=Target("output", 0), flow=flow, ledger=True).prepare(model) as explained:
                td = explained(TensorDict({"input": x}, batch_size=[16]))
            found.append(td["attr", "input"])
            assert td["ledger", "gap"].abs().max() < 1e-12
    for other in found[1:]:
        assert_close(other, found[0])
