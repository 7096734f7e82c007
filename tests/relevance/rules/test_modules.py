"""Activations, normalisation, pooling, attention, and any other module: every rule equals its definition."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tdhook.models.layers import Sum
from tdhook.rules import (
    AHQKVRule,
    EpsilonRule,
    IgnoreRule,
    LayerNormRule,
    NormRule,
    PassRule,
    PseudoIdentityRule,
    ReLUBetaSmoothRule,
    ReLUDeconvNetRule,
    ReLUGuidedBackpropRule,
    SoftmaxEpsilonRule,
    StopRule,
    UniformRule,
)

from . import reference
from .checks import assert_close, registered_relevance
from .layers import DTYPE, Product, draw

any_batch = pytest.mark.parametrize("batch", [(), (3,), (2, 3), (2, 1, 2)], ids=str)


def randomise(module):
    with torch.no_grad():
        for n, parameter in enumerate(module.parameters()):
            parameter.copy_(draw(*parameter.shape, seed=100 + n))
    return module.to(DTYPE)


# --- Activations ----------------------------------------------------------------------------------

ACTIVATIONS = [
    nn.ReLU(),
    nn.GELU(),
    nn.GELU(approximate="tanh"),
    nn.SiLU(),
    nn.Tanh(),
    nn.Sigmoid(),
    nn.Softplus(),
    nn.LeakyReLU(0.1),
    nn.ELU(),
    nn.Hardswish(),
]
every_activation = pytest.mark.parametrize("module", ACTIVATIONS, ids=str)


@any_batch
@every_activation
def test_pass(module, batch):
    x, r = draw(*batch, 4), draw(*batch, 4, seed=1)
    (actual,) = registered_relevance(PassRule(), module, [x], r)
    assert torch.equal(actual, reference.pass_through(x, r))


def test_pass_takes_inputs_to_outputs_in_order():
    class Swap(nn.Module):
        def forward(self, a, b):
            return a.exp(), b.sin()

    inputs, relevance = [draw(2, 3), draw(4, seed=1)], [draw(2, 3, seed=2), draw(4, seed=3)]
    actual = registered_relevance(PassRule(), Swap(), inputs, relevance)
    assert all(torch.equal(a, r) for a, r in zip(actual, relevance, strict=True))


@any_batch
@every_activation
def test_stop(module, batch):
    x, r = draw(*batch, 4), draw(*batch, 4, seed=1)
    (actual,) = registered_relevance(StopRule(), module, [x], r)
    assert torch.equal(actual, reference.stop(x, r))


@pytest.mark.parametrize("module", [nn.Linear(4, 3), nn.Bilinear(4, 5, 3)], ids=str)
def test_stop_for_every_input_of_any_module(module):
    inputs = [draw(2, 4), draw(2, 5)][: 1 + isinstance(module, nn.Bilinear)]
    for actual, x in zip(
        registered_relevance(StopRule(), module.double(), inputs, draw(2, 3)), inputs, strict=True
    ):
        assert torch.equal(actual, torch.zeros_like(x))


@pytest.mark.parametrize("module", [*ACTIVATIONS, nn.Linear(4, 4), nn.LayerNorm(4), nn.MaxPool1d(2)], ids=str)
def test_ignore_is_the_gradient(module):
    module = module.to(DTYPE)
    x = draw(3, 4)
    r = draw(*module(x).shape, seed=1)
    (actual,) = registered_relevance(IgnoreRule(), module, [x], r)
    assert_close(actual, (reference.jacobian(module, x).T @ r.flatten()).reshape(x.shape))


@any_batch
@every_activation
def test_pseudo_identity(module, batch):
    x, g = draw(*batch, 4), draw(*batch, 4, seed=1)
    x[..., 1] = 0.0
    for stab in (1e-6, 0.5, lambda z: z * 2 + 3.0):
        (actual,) = registered_relevance(PseudoIdentityRule(stab), module, [x], g)
        assert_close(actual, reference.pseudo_identity(x, module(x), g, stab=stab))


RECTIFIERS = {
    "deconvnet": (ReLUDeconvNetRule(), reference.relu_deconvnet, {}),
    "guided": (ReLUGuidedBackpropRule(), reference.relu_guided, {}),
    "beta_smooth": (ReLUBetaSmoothRule(), reference.relu_beta_smooth, {}),
    "beta_smooth_2": (ReLUBetaSmoothRule(beta=2.0), reference.relu_beta_smooth, {"beta": 2.0}),
}


@any_batch
@pytest.mark.parametrize("rule, function, parameters", RECTIFIERS.values(), ids=RECTIFIERS)
def test_rectifiers(rule, function, parameters, batch):
    x, g = draw(*batch, 6), draw(*batch, 6, seed=1)
    x[..., 1] = 0.0
    (actual,) = registered_relevance(rule, nn.ReLU(), [x], g)
    assert_close(actual, function(x, g, **parameters))


def test_beta_smooth_far_from_zero_is_the_step():
    x, g = torch.tensor([-1e4, 1e4], dtype=DTYPE), torch.tensor([2.0, 3.0], dtype=DTYPE)
    (actual,) = registered_relevance(ReLUBetaSmoothRule(), nn.ReLU(), [x], g)
    assert_close(actual, torch.tensor([0.0, 3.0], dtype=DTYPE))


IN_PLACE = {
    "pass": (PassRule(), lambda x, r: r),
    "stop": (StopRule(), lambda x, r: torch.zeros_like(x)),
    "ignore": (IgnoreRule(), lambda x, r: r * (x > 0)),
    "epsilon": (EpsilonRule(0.1), lambda x, r: x * (x > 0) * r / (x.clamp(min=0) + 0.1)),
    "pseudo_identity": (
        PseudoIdentityRule(0.1),
        lambda x, r: reference.pseudo_identity(x, x.clamp(min=0), r, stab=0.1),
    ),
    "deconvnet": (ReLUDeconvNetRule(), reference.relu_deconvnet),
    "guided": (ReLUGuidedBackpropRule(), reference.relu_guided),
    "beta_smooth": (ReLUBetaSmoothRule(), reference.relu_beta_smooth),
}


@pytest.mark.parametrize("rule, expected", IN_PLACE.values(), ids=IN_PLACE)
def test_in_place_activation(rule, expected):
    x, r = draw(2, 5), draw(2, 5, seed=1)
    leaf = x.clone().requires_grad_()
    with rule.register(module := nn.ReLU(inplace=True)):
        out = module(leaf * 1)
        out.backward(r)
    assert torch.equal(out, x.clamp(min=0))
    assert_close(leaf.grad, expected(x, r))


# --- Normalisation and attention ------------------------------------------------------------------


@any_batch
@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 1, 3)], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"bias": False}, {"elementwise_affine": False}, {"eps": 0.1}],
    ids=["affine", "no_bias", "no_affine", "large_eps"],
)
def test_layer_norm(options, shape, batch):
    module = randomise(nn.LayerNorm(shape, **options))
    x, g = draw(*batch, *shape), draw(*batch, *shape, seed=1)
    (actual,) = registered_relevance(LayerNormRule(), module, [x], g)
    assert_close(actual, reference.layer_norm(x, g, module.weight, module.eps, len(shape)))


@any_batch
@pytest.mark.parametrize("shape", [(5,), (3, 4)], ids=str)
@pytest.mark.parametrize("options", [{}, {"eps": 0.1}, {"elementwise_affine": False}], ids=str)
def test_rms_norm(options, shape, batch):
    module = randomise(nn.RMSNorm(shape, **options))
    x, g = draw(*batch, *shape), draw(*batch, *shape, seed=1)
    (actual,) = registered_relevance(LayerNormRule(), module, [x], g)
    eps = torch.finfo(DTYPE).eps if module.eps is None else module.eps
    assert_close(actual, reference.rms_norm(x, g, module.weight, eps, len(shape)))


@any_batch
def test_softmax(batch):
    x, r = draw(*batch, 4), draw(*batch, 4, seed=1)
    (actual,) = registered_relevance(SoftmaxEpsilonRule(), nn.Softmax(-1), [x], r)
    assert_close(actual, reference.softmax_epsilon(x, r))


def test_softmax_with_masked_and_large_scores():
    x, r = torch.tensor([[800.0, 799.0, -1e4]], dtype=DTYPE), torch.tensor([[1.0, 2.0, 3.0]], dtype=DTYPE)
    (actual,) = registered_relevance(SoftmaxEpsilonRule(), nn.Softmax(-1), [x], r)
    assert_close(actual, reference.softmax_epsilon(x, r))


@any_batch
@pytest.mark.parametrize("bias", [False, True])
def test_packed_query_key_value(bias, batch):
    module = nn.Linear(4, 9, bias=bias, dtype=DTYPE)
    x, g = draw(*batch, 4), draw(*batch, 9, seed=1)
    (actual,) = registered_relevance(AHQKVRule(), module, [x], g)
    assert_close(actual, reference.ahqkv(module.weight, g))


# --- Pooling and sums -----------------------------------------------------------------------------

POOLS = {
    "avg1d": (nn.AvgPool1d(2), (2, 5)),
    "avg1d_stride": (nn.AvgPool1d(3, stride=1, padding=1), (2, 5)),
    "avg2d": (nn.AvgPool2d(2), (2, 4, 5)),
    "avg2d_padded": (nn.AvgPool2d((3, 2), stride=(1, 2), padding=1, count_include_pad=False), (2, 4, 4)),
    "avg2d_ceil": (nn.AvgPool2d(2, ceil_mode=True, divisor_override=3), (1, 3, 5)),
    "avg3d": (nn.AvgPool3d(2), (1, 2, 4, 2)),
    "adaptive1d": (nn.AdaptiveAvgPool1d(3), (2, 5)),
    "adaptive2d": (nn.AdaptiveAvgPool2d((1, 2)), (2, 3, 3)),
    "adaptive3d": (nn.AdaptiveAvgPool3d(1), (2, 2, 2, 2)),
    "sum": (Sum(), (3, 4)),
    "sum_of_channels": (Sum(dim=-3), (3, 2, 2)),
}


@pytest.mark.parametrize("batch", [(), (2,)], ids=str)
@pytest.mark.parametrize("rule, stab", [(NormRule(), 1e-6), (NormRule(0.3), 0.3), (EpsilonRule(0.1), 0.1)])
@pytest.mark.parametrize("module, shape", POOLS.values(), ids=POOLS)
def test_pooling(module, shape, rule, stab, batch):
    for x in (draw(*batch, *shape), draw(*batch, *shape).clamp(min=0)):
        r = draw(*module(x).shape, seed=1)
        (actual,) = registered_relevance(rule, module, [x], r)
        assert_close(actual, reference.norm(module, x, r, stab=stab))


# --- Precision ------------------------------------------------------------------------------------


def positive(module):
    """Modules with weights, on positive inputs with positive weights: nothing cancels."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(
                0.5 + 0.5 * torch.rand(parameter.shape, generator=torch.Generator().manual_seed(5))
            )
    return module


PRECISION = {
    "pass": (PassRule(), nn.GELU()),
    "stop": (StopRule(), nn.GELU()),
    "ignore": (IgnoreRule(), nn.Linear(6, 3)),
    "pseudo_identity": (PseudoIdentityRule(), nn.SiLU()),
    "deconvnet": (ReLUDeconvNetRule(), nn.ReLU()),
    "guided": (ReLUGuidedBackpropRule(), nn.ReLU()),
    "beta_smooth": (ReLUBetaSmoothRule(), nn.ReLU()),
    "layer_norm": (LayerNormRule(), nn.LayerNorm(6)),
    "rms_norm": (LayerNormRule(), nn.RMSNorm(6, eps=1e-5)),
    "softmax": (SoftmaxEpsilonRule(), nn.Softmax(-1)),
    "ahqkv": (AHQKVRule(), nn.Linear(6, 9)),
    "norm": (NormRule(), nn.AvgPool1d(2)),
    "uniform": (UniformRule(), Product()),
    "generic": (EpsilonRule(), nn.Softplus()),
}


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)], ids=str)
@pytest.mark.parametrize("rule, module", PRECISION.values(), ids=PRECISION)
def test_lower_precision_is_close_to_float64(rule, module, dtype, tolerance):
    x = (0.5 + draw(3, 6).abs()).to(dtype)
    module = positive(module).to(dtype)
    r = draw(*module(x).shape, seed=1).abs().to(dtype)
    (actual,) = registered_relevance(rule, module, [x], r)
    assert actual.dtype == dtype
    (expected,) = registered_relevance(rule, module.double(), [x.double()], r.double())
    assert_close(actual, expected, tolerance)
