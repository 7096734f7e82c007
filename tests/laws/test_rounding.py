"""Explanations are as exact as the precision that they are computed in: no epsilon that no user asked for shows.

Single precision is compared with double precision. Half precision, whose numbers end at 65504, stays finite.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import Tensor, nn

from tdhook import LRP, Target
from tdhook.composites import PRESETS, preset
from tdhook.rules import (
    AlphaBetaRule,
    EpsilonRule,
    FlatRule,
    GammaRule,
    LayerNormRule,
    PseudoIdentityRule,
    WSquareRule,
    ZBoxRule,
    ZPlusRule,
)

FLOWS = ("relevance", "gradient")
each_flow = pytest.mark.parametrize("flow", FLOWS)


def relevance(model: nn.Module, x: Tensor, composite: object, flow: str, **options: object) -> Tensor:
    method = LRP(composite, target=Target("output", 0), flow=flow, **options)
    with method.prepare(model) as explained:
        return explained(TensorDict({"input": x}, [len(x)]))["attr", "input"].double()


def off(model: nn.Module, x: Tensor, composite: object, flow: str, **options: object) -> float:
    """How far the worst sample in single precision is from that in double precision, relative to its size."""
    single = relevance(model, x, composite, flow, **options).flatten(1)
    double = relevance(copy.deepcopy(model).double(), x.double(), composite, flow).flatten(1)
    return float(((single - double).norm(dim=1) / double.norm(dim=1)).max())


ACTIVATIONS = (
    nn.GELU,
    lambda: nn.GELU("tanh"),
    nn.SiLU,
    nn.Mish,
    nn.Tanh,
    nn.ELU,
    nn.SELU,
    nn.Hardswish,
    nn.LeakyReLU,
    nn.ReLU6,
    nn.Softsign,
)


@each_flow
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda f: type(f()).__name__)
def test_activations_that_pass(activation: Callable[[], nn.Module], flow: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(16, 256), activation(), nn.Linear(256, 256), activation(), nn.Linear(256, 4)
    )
    assert off(model, torch.randn(256, 16), "attn_lrp", flow) < 1e-5


class Sums(nn.Module):
    """Sums whose terms nearly cancel."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        centred = h - h.mean(-1, keepdim=True)
        return self.last(F.gelu(centred * 1e-3) * h.tanh())


@each_flow
def test_sums_that_cancel(flow: str) -> None:
    torch.manual_seed(0)
    assert off(Sums(), torch.randn(256, 8), "attn_lrp", flow) < 1e-5


@each_flow
def test_a_compiled_explanation(flow: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 4))
    assert off(model, torch.randn(64, 16), "attn_lrp", flow, compile={"backend": "aot_eager"}) < 1e-5


def dark() -> nn.Module:
    """Some outputs of its first layer have no positive contribution, others are zero."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(2, 4, 1),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(12, 6),
        nn.Sigmoid(),
        nn.LayerNorm(6),
        nn.Linear(6, 2),
    )
    with torch.no_grad():
        model[0].weight[0], model[0].bias[0] = -1, 0
        model[0].weight[1], model[0].bias[1] = 0, 0
        model[0].weight[2], model[0].bias[2] = 1e-6, 0
    return model


RULES = {
    "epsilon": EpsilonRule(),
    "epsilon 0": EpsilonRule(0.0),
    "alpha beta": AlphaBetaRule(),
    "z plus": ZPlusRule(),
    "gamma": GammaRule(),
    "z box": ZBoxRule(0.0, 1.0),
    "w square": WSquareRule(),
    "flat": FlatRule(),
}
COMPOSITES = {
    **{name: [((nn.Conv1d, nn.Linear), rule)] for name, rule in RULES.items()},
    "pseudo identity": [((nn.GELU, nn.Sigmoid), PseudoIdentityRule())],
    "layer norm": [(nn.LayerNorm, LayerNormRule())],
    **{
        name: preset(name)
        for name in PRESETS
        if name not in ("epsilon_gamma_box", "guided_backprop", "deconvnet", "beta_smooth")
        and name not in ("deeplift_reveal_cancel", "deeplift_shapley")  # need a baseline
    },
}


@each_flow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", COMPOSITES)
def test_half_precision_is_finite_where_single_precision_is(name: str, dtype: torch.dtype, flow: str) -> None:
    model, x = dark(), torch.rand(8, 2, 3)
    x[0, 0] = 0
    single = relevance(model, x, COMPOSITES[name], flow)
    assert single.isfinite().all()
    half = relevance(model.to(dtype), x.to(dtype), COMPOSITES[name], flow)
    assert half.isfinite().all()


NORMS = {
    "layer norm": nn.LayerNorm(8),
    "rms norm": nn.RMSNorm(8, eps=1e-5),
    "group norm": nn.Sequential(nn.Unflatten(1, (4, 2)), nn.GroupNorm(2, 4), nn.Flatten()),
    "instance norm": nn.Sequential(nn.Unflatten(1, (2, 4)), nn.InstanceNorm1d(2), nn.Flatten()),
}


class Divided(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()


@each_flow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("norm", [*NORMS.values(), Divided()], ids=[*NORMS, "by hand"])
def test_half_precision_is_that_of_single_precision_against_equal_values(
    norm: nn.Module, dtype: torch.dtype, flow: str
) -> None:
    """Whose deviation is nothing, and the inverse of it large."""
    torch.manual_seed(0)
    model = nn.Sequential(norm, nn.Linear(8, 2)).to(dtype)
    x = torch.randn(16, 8).to(dtype)
    half = relevance(model, x, "epsilon", flow, baseline=0.25)
    single = relevance(copy.deepcopy(model).float(), x.float(), "epsilon", flow, baseline=0.25)
    off = (half - single).norm(dim=1) / single.norm(dim=1)
    assert off.median() < (0.01 if dtype is torch.float16 else 0.1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_normalisation_in_half_precision_squares_in_single(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 2))
    x = 300 * torch.randn(4, 16)
    single = relevance(model, x, "attn_lrp", "gradient")
    half = relevance(model.to(dtype), x.to(dtype), "attn_lrp", "gradient")
    assert torch.cosine_similarity(single, half).min() > 0.999


def test_relevance_beyond_float16_is_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        model[1].weight.copy_(torch.tensor([[30000.0, 30000.0]]))
    x = torch.tensor([[4.0, -3.5]]).half()
    with pytest.raises(ValueError, match="float16 has no numbers beyond 65504: explain the model in float32"):
        relevance(model.half(), x, "epsilon", "relevance")
