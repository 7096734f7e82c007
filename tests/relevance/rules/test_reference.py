"""Linear layers and convolutions: every rule equals its definition in matrix form."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tdhook.rules import (
    AlphaBetaRule,
    EpsilonRule,
    FlatRule,
    GammaRule,
    UniformEpsilonRule,
    WSquareRule,
    ZBoxRule,
    ZPlusRule,
    stabilize,
)

from . import reference
from .cases import check, every_layer, every_rule, some_layers
from .checks import assert_close, registered_relevance
from .layers import CASES, DTYPE, SMALL

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")


@every_layer
def test_the_reference_matrix_is_the_layer(case):
    x, _ = case.draw(True)
    matrix = case.explicit
    z = matrix.weight @ x.flatten()[matrix.source] + matrix.bias
    assert_close(case.layer(x).detach().flatten(), z)


@every_layer
@every_rule
def test_equals_matrix_form(case, rule):
    check(case, *rule, *case.draw(True, 2))
    check(case, *rule, *case.draw(False))


@pytest.mark.parametrize("batch", [(3,), (2, 3), (1, 2, 1, 2)], ids=str)
@pytest.mark.parametrize("case", [case for case in CASES if "linear" in case.name], ids=str)
@every_rule
def test_any_batch_dims_of_linear(case, rule, batch):
    check(case, *rule, *case.draw(True, *batch))


@some_layers
@every_rule
def test_an_empty_batch_has_an_empty_relevance(case, rule):
    x, r = case.draw(True, 0)
    (actual,) = registered_relevance(rule[0], case.layer, [x], r)
    assert actual.shape == x.shape


@some_layers
@every_rule
def test_each_sample_is_explained_alone(case, rule):
    x, r = case.draw(True, 3)
    (together,) = registered_relevance(rule[0], case.layer, [x], r)
    for n in range(3):
        (alone,) = registered_relevance(rule[0], case.layer, [x[n : n + 1]], r[n : n + 1])
        assert_close(together[n : n + 1], alone)


@some_layers
@every_rule
def test_memory_layout_does_not_matter(case, rule):
    x, r = case.draw(True, 2)
    twice = torch.stack([x, x], dim=-1)[..., 0]
    mirrored = r.transpose(0, -1).contiguous().transpose(0, -1)
    assert not twice.is_contiguous()
    check(case, *rule, twice, mirrored)
    check(case, *rule, x, torch.ones((), dtype=DTYPE).expand_as(r))


@pytest.mark.parametrize("low_shape", ["input", "batch", "channels"])
@some_layers
def test_box_as_tensors(case, low_shape):
    x, r = case.draw(True, 2)
    shape = {
        "input": case.in_shape,
        "batch": x.shape,
        "channels": (case.in_shape[0], *[1] * (len(case.in_shape) - 1)),
    }[low_shape]
    torch.manual_seed(3)
    low, high = -3 - torch.rand(shape, dtype=DTYPE), 3 + torch.rand(shape, dtype=DTYPE)
    check(case, ZBoxRule(low, high), "zbox", {"low": low, "high": high}, x, r)
    check(case, ZBoxRule(low, 3.0), "zbox", {"low": low, "high": 3.0}, x, r)
    check(case, ZBoxRule(-3.0, high), "zbox", {"low": -3.0, "high": high}, x, r)


def shifted(z):
    """A stabiliser of the caller's own: nothing that ``z + epsilon * sign(z)`` could be."""
    return torch.where(z.abs() < 0.2, 0.3, z)


CALLABLE = {
    "epsilon": (lambda: EpsilonRule(shifted), {}),
    "uniform_epsilon": (lambda: UniformEpsilonRule(shifted), {}),
    "gamma": (lambda: GammaRule(stabilizer=shifted), {}),
    "alpha_beta": (lambda: AlphaBetaRule(stabilizer=shifted), {}),
    "zplus": (lambda: ZPlusRule(stabilizer=shifted), {}),
    "zbox": (lambda: ZBoxRule(-1.0, 2.0, stabilizer=shifted), {"low": -1.0, "high": 2.0}),
    "wsquare": (lambda: WSquareRule(stabilizer=shifted), {}),
    "flat": (lambda: FlatRule(stabilizer=lambda n: n + 1.0), {"stab": lambda n: n + 1.0}),
}


@some_layers
@pytest.mark.parametrize("name", CALLABLE)
def test_stabiliser_as_a_function(case, name):
    make, parameters = CALLABLE[name]
    parameters = {"stab": shifted, **parameters}
    check(case, make(), name.removeprefix("uniform_"), parameters, *case.draw(True, 3))


@some_layers
@pytest.mark.parametrize("kind", [EpsilonRule, GammaRule, AlphaBetaRule, ZPlusRule, WSquareRule])
def test_without_its_weight_a_layer_passes_nothing(case, kind):
    x, r = case.draw(True, 2)
    (actual,) = registered_relevance(kind(zero_params=["weight"]), case.layer, [x], r)
    assert not actual.any()


def test_stabilise():
    z = torch.tensor([-2.0, -0.0, 0.0, 1e-30, 3.0], dtype=DTYPE)
    assert_close(stabilize(z, 0.5), torch.tensor([-2.5, 0.5, 0.5, 0.5, 3.5], dtype=DTYPE))
    assert torch.equal(stabilize(z), reference.stabiliser(1e-6)(z))


def test_epsilon_can_be_set_between_two_explanations():
    case = SMALL[0]
    x, r = case.draw(True, 2)
    rule = EpsilonRule(0.1)
    assert rule.epsilon == 0.1
    with rule.register(case.layer):
        for epsilon in (0.1, 2.0):
            rule.epsilon = epsilon
            leaf = x.clone().requires_grad_()
            case.layer(leaf).backward(r)
            assert_close(leaf.grad, reference.relevance("epsilon", case.explicit, x, r, stab=epsilon))


@pytest.mark.parametrize("name", ["conv2d_stride_pad", "conv3d"])
@every_rule
def test_channels_last(name, rule):
    case = next(case for case in SMALL if case.name == name)
    x, r = case.draw(True, 2)
    order = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    check(case, *rule, x.to(memory_format=order), r.to(memory_format=order))


def two_into_one(*weights, bias=None):
    layer = nn.Linear(len(weights), 1, bias=bias is not None, dtype=DTYPE)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([weights]))
        if bias is not None:
            layer.bias.fill_(bias)
    return layer


BY_HAND = {
    # z = 0 is stabilised upwards
    "epsilon_zero": (EpsilonRule(0.5), two_into_one(1.0, -1.0), [1.0, 1.0], [2.0, -2.0]),
    "epsilon_negative": (EpsilonRule(0.5), two_into_one(1.0, -2.0), [1.0, 1.0], [-1 / 1.5, 2 / 1.5]),
    "epsilon_bias": (EpsilonRule(0.0), two_into_one(1.0, 2.0, bias=1.0), [1.0, 1.0], [0.25, 0.5]),
    # z = 0 counts as positive: the positive contribution is the favoured one
    "gamma_zero": (GammaRule(1.0, stabilizer=0.0), two_into_one(1.0, -1.0), [1.0, 1.0], [2.0, -1.0]),
    "gamma_negative": (GammaRule(1.0, stabilizer=0.0), two_into_one(1.0, -2.0), [1.0, 1.0], [-1 / 3, 4 / 3]),
    "gamma_signed_input": (
        GammaRule(1.0, stabilizer=0.0),
        two_into_one(-1.0, 1.0),
        [-2.0, -1.0],
        [4 / 3, -1 / 3],
    ),
    # the bias makes z positive, and is the only favoured contribution
    "gamma_bias": (
        GammaRule(1.0, stabilizer=0.0),
        two_into_one(-1.0, -1.0, bias=3.0),
        [1.0, 1.0],
        [-1 / 4, -1 / 4],
    ),
    "alpha_beta": (AlphaBetaRule(stabilizer=0.0), two_into_one(1.0, -3.0), [1.0, 1.0], [2.0, -1.0]),
    "alpha_beta_bias": (
        AlphaBetaRule(stabilizer=0.0),
        two_into_one(1.0, -3.0, bias=-1.0),
        [1.0, 1.0],
        [2.0, -0.75],
    ),
    "alpha_beta_nothing_negative": (
        AlphaBetaRule(),
        two_into_one(1.0, 1.0),
        [1.0, 0.0],
        [2 / (1 + 1e-6), 0.0],
    ),
    "zplus_both_negative": (ZPlusRule(stabilizer=0.0), two_into_one(-1.0, 3.0), [-1.0, 1.0], [0.25, 0.75]),
    "zbox": (
        ZBoxRule(-1.0, 1.0, stabilizer=0.0),
        two_into_one(1.0, -1.0, bias=5.0),
        [0.0, 0.5],
        [2 / 3, 1 / 3],
    ),
    "wsquare": (WSquareRule(stabilizer=0.0), two_into_one(1.0, -2.0, bias=1.0), [0.0, 9.0], [1 / 6, 4 / 6]),
    "flat": (FlatRule(stabilizer=0.0), two_into_one(0.0, -2.0, bias=1.0), [0.0, 9.0], [0.5, 0.5]),
}


@pytest.mark.parametrize("rule, layer, x, expected", BY_HAND.values(), ids=BY_HAND)
def test_by_hand(rule, layer, x, expected):
    for sample, shares in (([x], [expected]), (x, expected)):
        sample = torch.tensor(sample, dtype=DTYPE)
        (actual,) = registered_relevance(
            rule, layer, [sample], torch.ones(*sample.shape[:-1], 1, dtype=DTYPE)
        )
        assert_close(actual, torch.tensor(shares, dtype=DTYPE))


# --- Precision ------------------------------------------------------------------------------------


def well_conditioned(case, dtype):
    """The case's layer with large positive and small negative weights: no denominator nearly cancels."""
    layer = copy.deepcopy(case.layer)
    torch.manual_seed(11)
    with torch.no_grad():
        for parameter in layer.parameters():
            values = 0.5 + 0.5 * torch.rand(parameter.shape, dtype=DTYPE)
            values.view(-1)[2::5] *= -0.2
            parameter.copy_(values)
    x, r = case.draw(True, 2)
    return layer.to(dtype), (0.5 + torch.rand_like(x)).to(dtype), (0.5 + torch.rand_like(r)).to(dtype)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)], ids=str)
@some_layers
@every_rule
def test_lower_precision_is_close_to_float64(case, rule, dtype, tolerance):
    layer, x, r = well_conditioned(case, dtype)
    rule, name, parameters = rule
    (actual,) = registered_relevance(rule, layer, [x], r)
    assert actual.dtype == dtype
    expected = reference.relevance(name, reference.explicit(layer, case.in_shape), x, r, **parameters)
    assert_close(actual, expected, tolerance)
