"""Explanations in bfloat16, of models that are in it or run under autocast, are those in single precision.

What a cosine may lose is some three times what was measured, the worst of four samples. Where activations are added
up with either sign, as in a convolutional network with random weights, rounding its weights to bfloat16 costs as much.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from tdhook import LRP, Target

sys.path.insert(0, str(Path(__file__).parents[2]))  # torchrl installs a package of that name, too

from benchmarks.models import GPT2Layer, LlamaLayer, RMSNorm, Transformer, nature_cnn

WIDTH, VOCABULARY = 32, 50


def gpt2() -> nn.Module:
    return Transformer([GPT2Layer(WIDTH, 2) for _ in range(2)], nn.LayerNorm(WIDTH), WIDTH, VOCABULARY)


def llama() -> nn.Module:
    return Transformer([LlamaLayer(WIDTH, 4, 2, 48) for _ in range(2)], RMSNorm(WIDTH), WIDTH, VOCABULARY)


def batch_normed() -> nn.Module:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 3 * 3, 5),
    )  # fmt: skip
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.normal_(module.weight, mean=1.0, std=0.2)
            nn.init.normal_(module.bias, std=0.1)
    return model


TOKENS, ATARI, IMAGE = (6, WIDTH), (4, 84, 84), (3, 8, 8)
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str, float]] = {
    "gpt2, attn_lrp": (gpt2, TOKENS, "attn_lrp", 0.999),
    "gpt2, cp_lrp": (gpt2, TOKENS, "cp_lrp", 0.999),
    "llama, attn_lrp": (llama, TOKENS, "attn_lrp", 0.999),
    "llama, cp_lrp": (llama, TOKENS, "cp_lrp", 0.999),
    "nature_cnn, epsilon_plus": (nature_cnn, ATARI, "epsilon_plus", 0.97),
    "nature_cnn, epsilon_alpha2_beta1": (nature_cnn, ATARI, "epsilon_alpha2_beta1", 0.97),
    "batch_normed, epsilon_plus": (batch_normed, IMAGE, "epsilon_plus", 0.999),
    "batch_normed, epsilon_alpha2_beta1": (batch_normed, IMAGE, "epsilon_alpha2_beta1", 0.999),
}
each_case = pytest.mark.parametrize("name", CASES)
each_flow = pytest.mark.parametrize("flow", ["gradient", "relevance"])


def case(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """The model, four samples, and which of its outputs is explained."""
    build, shape, _, _ = CASES[name]
    model = build().eval()
    x = torch.randn(4, *shape)
    with torch.no_grad():
        return model, x, model(x).argmax(-1)


def explain(name: str, flow: str, model: nn.Module, x: Tensor, index: Tensor) -> TensorDict:
    method = LRP(CASES[name][2], target=Target("output", index), flow=flow, on_unmatched="raise")
    with method.prepare(model) as explained:
        return explained(TensorDict({"input": x}, [len(x)]))


def assert_alike(low: TensorDict, full: TensorDict, floor: float) -> None:
    relevance, expected = (td["attr", "input"].float().flatten(1) for td in (low, full))
    assert relevance.isfinite().all()
    cosines = torch.cosine_similarity(relevance, expected)
    assert (cosines > floor).all(), cosines.tolist()


@each_flow
@each_case
def test_under_autocast(name: str, flow: str) -> None:
    model, x, index = case(name)
    full = explain(name, flow, model, x, index)
    with torch.autocast("cpu", torch.bfloat16):
        low = explain(name, flow, model, x, index)
        assert torch.equal(low["output"], model(x))
    assert low["output"].dtype == torch.bfloat16 and low["attr", "input"].dtype == torch.float32
    assert_alike(low, full, CASES[name][3])


@each_flow
@each_case
def test_of_a_model_in_bfloat16(name: str, flow: str) -> None:
    model, x, index = case(name)
    full = explain(name, flow, model, x, index)
    low = explain(name, flow, copy.deepcopy(model).bfloat16(), x.bfloat16(), index)
    assert low["output"].dtype == low["attr", "input"].dtype == torch.bfloat16
    # In the relevance flow, relevance itself is rounded at each step.
    assert_alike(low, full, CASES[name][3] if flow == "gradient" else min(CASES[name][3], 0.985))


@each_flow
@pytest.mark.parametrize("baseline", [None, 0.25])
@pytest.mark.parametrize("composite", ["epsilon_plus", "excitation_backprop", "epsilon_alpha2_beta1_flat"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_of_batch_norms_that_are_kept_in_single_precision(
    dtype: torch.dtype, composite: str, baseline: float | None, flow: str
) -> None:
    torch.manual_seed(0)
    model = batch_normed().eval().to(dtype)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.float()
    x = torch.randn(8, *IMAGE).to(dtype)

    def relevance(model: nn.Module, x: Tensor) -> Tensor:
        method = LRP(composite, target=Target("output", 0), flow=flow, baseline=baseline)
        with method.prepare(model) as explained:
            return explained(TensorDict({"input": x}, [len(x)]))["attr", "input"].flatten(1)

    low, full = relevance(model, x), relevance(copy.deepcopy(model).double(), x.double())
    off = (low - full).norm(dim=1) / full.norm(dim=1)
    assert off.median() < (0.02 if dtype is torch.float16 else 0.15), off


@each_flow
def test_activations_of_small_numbers_keep_relevance(flow: str) -> None:
    # A stabiliser of 1e-3, which rounding in bfloat16 does not ask for, would take most of it.
    model = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 3)).bfloat16()
    with torch.no_grad():
        model[0].bias.zero_()
        model[2].bias.zero_()
    x = (1e-3 * torch.randn(4, 16)).bfloat16()
    index = torch.zeros(4, dtype=torch.long)
    td = TensorDict({"input": x}, [4])
    with LRP("attn_lrp", target=Target("output", index), flow=flow).prepare(model) as explained:
        low = explained(td.clone())
    total, target = low["attr", "input"].double().sum(-1), low["output"].double()[:, 0]
    assert (total - target).abs().max() < 0.05 * target.abs().max()


class Casting(nn.Module):
    """A model that says itself in which precision it computes, and has products of any two precisions."""

    def __init__(self, enabled: bool, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enabled, self.dtype = enabled, dtype
        self.first, self.second, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.attention, self.weight = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 8).weight

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", self.dtype, enabled=self.enabled):
            tokens = self.first(x)
            wide = tokens.to(x.dtype)
            mixed = (wide @ wide.mT / 3).softmax(-1) @ wide + self.attention(wide, wide, wide)[0]
            return self.last((self.second(tokens).relu() + mixed @ self.weight).mean(1))


def of_casting(model: nn.Module, composite: str, flow: str, **options: object) -> TensorDict:
    x = torch.randn(16, 3, 6, generator=torch.Generator().manual_seed(0)).to(model.last.weight.dtype)
    with LRP(composite, target=Target("output", 0), flow=flow, **options).prepare(model) as explained:
        return explained(TensorDict({"input": x}, [16]))


@each_flow
@pytest.mark.parametrize("baseline", [None, 0.25])
@pytest.mark.parametrize("composite", ["attn_lrp", "epsilon_plus"])
@pytest.mark.parametrize("dtype, most", [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_of_a_model_that_casts_by_itself(
    dtype: torch.dtype, most: float, composite: str, baseline: float | None, flow: str
) -> None:
    model = Casting(True, dtype)
    low = of_casting(model, composite, flow, baseline=baseline, ledger=True)
    full = of_casting(Casting(False).double(), composite, flow, baseline=baseline)["attr", "input"].flatten(1)
    off = (low["attr", "input"].flatten(1) - full).norm(dim=1) / full.norm(dim=1)
    assert off.median() < most
    assert low["ledger", "gap"].abs().median() < most * low["ledger", "target"].abs().median()


@each_flow
@pytest.mark.parametrize("baseline", [None, 0.25])
@pytest.mark.parametrize("composite", ["attn_lrp", "epsilon_plus", "excitation_backprop"])
def test_what_is_computed_in_single_precision_is_explained_in_it(
    composite: str, baseline: float | None, flow: str
) -> None:
    """Autocast that is on around an explanation says nothing of what the model computes without it."""
    alone = of_casting(Casting(False), composite, flow, baseline=baseline)
    with torch.autocast("cpu", torch.bfloat16):
        within = of_casting(Casting(False), composite, flow, baseline=baseline)
    assert torch.equal(within["attr", "input"], alone["attr", "input"])
