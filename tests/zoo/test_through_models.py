"""Relevance through units of models of the transformers library: neurons, tokens, heads, channels, experts.

What passes all units of a layer, and what goes around it, is the relevance of the whole, to 1e-9 in double precision as
far as the model computes in it.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

from tdhook import LRP, Target
from tdhook.attribution import Attribution, GradientTimesInput
from tdhook.selectors import First, Op
from tdhook.targets import Through

from .transformers_models import CASES, MARKS, ready

pytestmark = MARKS

NAMES = (
    "GPT2LMHeadModel",
    "LlamaForCausalLM",
    "Qwen3MoeForCausalLM",
    "BertForSequenceClassification",
    "T5ForConditionalGeneration",
    "ViTForImageClassification",
    "SwinForImageClassification",
    "ResNetForImageClassification",
    "ConvNextForImageClassification",
)
SINGLE = (
    "LlamaForCausalLM",
    "Qwen3MoeForCausalLM",
    "T5ForConditionalGeneration",
    "ConvNextForImageClassification",
)
"""Their normalisation computes in single precision whatever the model's is, and rounds what comes back too."""
CHOSEN = [case for case in CASES.values() if case.model in NAMES]
METHODS: dict[str, Attribution] = {"attn_lrp": LRP("attn_lrp"), "gradient times input": GradientTimesInput()}


ELSEWHERE = ("does not depend", "was called", "none of whose axes", "does not begin", "returned", "no units")
"""Said of what is not on the way of this target, is called several times, or is no value of the batch."""


@pytest.fixture(autouse=True)
def _double():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def explained(method: Attribution, made, target) -> list[Tensor]:
    module, td, attributed = made
    asked = method.asked(
        target=target, use_inputs=not attributed["input_modules"], input_modules=attributed["input_modules"]
    )
    with asked.prepare(module, in_keys=attributed["in_keys"]) as run, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return list(run(td.copy())["attr"].values(True, True))


def tolerance(case) -> float:
    return 3e-7 if case.id in SINGLE else 1e-9


def places(module: nn.Module) -> list[tuple[str, str]]:
    """Leaf modules by path, one of each name, and the first of its name among blocks alone."""
    found: dict[str, str] = {}
    for path, child in module.named_modules():
        if path and not list(child.children()):
            named = ".".join(part for part in path.split(".") if not part.isdigit())
            found.setdefault(f"{named} {type(child).__name__}", path)
    return list(found.items())


@pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))
@pytest.mark.parametrize("case", CHOSEN, ids=lambda case: case.id)
def test_what_passes_and_what_goes_around_is_all(case, method):
    made = ready(case)
    whole = explained(method, made, Target("answer", "argmax"))
    scale = max(float(x.abs().max()) for x in whole)
    passed = 0
    for _, path in places(made[0]):
        try:
            units = explained(method, made, Through(Target("answer", "argmax"), path, axis=-1))
            around = explained(
                method, made, Through(Target("answer", "argmax"), path, "none", -1, beside="counted")
            )
        except (ValueError, TypeError) as error:
            if not any(words in str(error) for words in ELSEWHERE):
                raise
            continue
        passed += 1
        for all_, each, past in zip(whole, units, around, strict=True):
            axis = len(made[1].batch_size)
            assert float((each.sum(axis) + past - all_).abs().max()) <= tolerance(case) * scale, path
    assert passed >= 5


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "LlamaForCausalLM", "ViTForImageClassification"])
@pytest.mark.parametrize("axis", [1, 2], ids=["heads", "tokens"])
def test_heads_and_tokens_of_attention(name, axis):
    (case,) = [case for case in CHOSEN if case.id == name]
    made = ready(case)
    place = First(Op("scaled_dot_product_attention"))
    target = Target("answer", "argmax")
    whole = explained(METHODS["attn_lrp"], made, target)
    each = explained(METHODS["attn_lrp"], made, Through(target, place, axis=axis))
    around = explained(METHODS["attn_lrp"], made, Through(target, place, "none", axis, beside="counted"))
    lead = len(made[1].batch_size)
    scale = max(float(x.abs().max()) for x in whole)
    for all_, units, past in zip(whole, each, around, strict=True):
        assert units.shape[lead] > 1
        assert float((units.sum(lead) + past - all_).abs().max()) <= tolerance(case) * scale
        assert float(units.sum(lead).abs().max()) > 1e-6 * scale
