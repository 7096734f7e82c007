"""Models of the transformers library in bfloat16: they explain what they explain in single precision.

Under ``torch.autocast``, as they are run on a GPU, with the output explained that is largest in single precision. Tiny
models with random weights are at times ill-conditioned; such a one is listed, and shown to be so in single precision.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from tdhook import LRP, Target

from .transformers_models import CASES, MARKS, ready

pytestmark = MARKS

ENOUGH = 0.99
# The cosine under autocast, measured, where it is not enough.
ILL_CONDITIONED = {
    "JambaForCausalLM": 0.960,
    "RecurrentGemmaForCausalLM": -0.208,
    "RegNetForImageClassification": -0.857,
    "BitForImageClassification": 0.976,
    "MobileNetV1ForImageClassification": -0.339,
    "MobileNetV2ForImageClassification": -0.317,
    "Wav2Vec2ConformerForSequenceClassification": -0.225,
    "Speech2TextForConditionalGeneration": 0.986,
}
# What cannot be run under autocast at all, and what it says.
FAILING = {"DebertaForSequenceClassification": "value cannot be converted to type c10::BFloat16"}


def autocast(enabled: bool = True) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=enabled)


def explain(module: nn.Module, td: TensorDict, attributed: dict[str, Any], top: Tensor, low: bool) -> Tensor:
    """The relevance of each sample."""
    paths = attributed["input_modules"]
    method = LRP(
        "attn_lrp",
        target=Target("answer", top),
        flow="gradient",
        use_inputs=not paths,
        input_modules=paths,
        on_unmatched="raise",
    )
    with autocast(low), method.prepare(module, in_keys=attributed["in_keys"]) as run:
        relevance = run(td.copy())["attr"]
    values = [value if td.batch_size else value.transpose(0, 1) for value in relevance.values(True, True)]
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in values)
    return torch.cat([value.flatten(1) for value in values], 1)


def cosine(a: Tensor, b: Tensor) -> float:
    """Of the worst sample; of two texts, one alone may be of use to what is explained."""
    some = (a != 0).any(1)
    assert some.any() and torch.equal(some, (b != 0).any(1))
    return torch.cosine_similarity(a[some], b[some]).min().item()


def most_likely(module: nn.Module, td: TensorDict) -> Tensor:
    with torch.no_grad():
        top: Tensor = module(td.copy())["answer"].argmax(-1)
    return top


def moved(module: nn.Module) -> nn.Module:
    """A copy, each of its parameters moved by no more than it would be by being rounded to bfloat16."""
    module = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1 + 2**-8 * (2 * torch.rand_like(parameter) - 1))
    return module


@pytest.mark.parametrize("name", [name for name in CASES if name not in (*ILL_CONDITIONED, *FAILING)])
def test_autocast_explains_the_same(name: str) -> None:
    module, td, attributed = ready(CASES[name])
    top = most_likely(module, td)
    full, low = (explain(module, td, attributed, top, low) for low in (False, True))
    assert cosine(full, low) > ENOUGH


@pytest.mark.parametrize("name", ILL_CONDITIONED)
def test_what_autocast_changes_is_as_sensitive_in_single_precision(name: str) -> None:
    module, td, attributed = ready(CASES[name])
    top = most_likely(module, td)
    full, low = (explain(module, td, attributed, top, low) for low in (False, True))
    assert cosine(full, low) <= ENOUGH, "it is no longer to be listed"
    nearby = [explain(moved(module), td, attributed, top, False) for _ in range(3)]
    assert min(cosine(full, other) for other in nearby) <= ENOUGH


@pytest.mark.parametrize("name", FAILING)
def test_what_cannot_be_run_under_autocast_cannot_be_without_explanation(name: str) -> None:
    module, td, _ = ready(CASES[name])
    with autocast(), torch.no_grad(), pytest.raises(RuntimeError, match=FAILING[name]):
        module(td.copy())
