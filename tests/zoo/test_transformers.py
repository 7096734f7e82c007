"""Models of the transformers library, as it ships them: all relevance arrives, whatever they are made of.

Weights and biases are random. Language models explain the most likely next token, others their largest
output; where a model reads token ids, the relevance is that of the embedded tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tdhook import Target
from tdhook.models.model import Model

from .checks import check, check_difference
from .transformers_case import Case
from .transformers_models import CASES, MARKS, ready

pytestmark = MARKS

# Those whose attention can be computed in both ways, one of each kind.
ATTENTION = (
    *("GPT2LMHeadModel", "LlamaForCausalLM", "FalconForCausalLM", "BertForSequenceClassification"),
    *(
        "BartForConditionalGeneration",
        "ViTForImageClassification",
        "WhisperForAudioClassification",
        "CLIPModel",
    ),
)


SINGLE = ("RecurrentGemmaForCausalLM",)
"""What these lose is rounding: their recurrence computes in single precision whatever the model is in."""

ROUNDING = {"ConvNextV2ForImageClassification": 3e-4}
"""How much rounding in single precision is of a difference, where much more cancels than is left."""

DECIDES_OFF_THE_TAPE = ("PhimoeForCausalLM",)
"""These choose experts within ``torch.no_grad``, where decisions are not seen, so that others are chosen."""


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    """Models make masks and positions in the default precision on the way."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def explain(case: Case, composite: str, *flows: str, **config: Any) -> dict[str, TensorDict]:
    """Check the explanation of the model's largest output in each flow."""
    module, td, attributed = ready(case, **config)
    tolerance = {"tolerance": 1e-5} if case.id in SINGLE else {}
    target = Target("answer", "argmax")
    return check(module, td, **attributed, target=target, flows=flows, composite=composite, **tolerance)


@pytest.mark.parametrize("name", CASES)
def test_all_relevance_is_accounted_for_in_both_flows_which_agree(name: str) -> None:
    explained = explain(CASES[name], "epsilon_plus", "relevance", "gradient")
    # Some models compute in single precision on the way.
    assert_close(explained["relevance"]["attr"], explained["gradient"]["attr"], 1e-3)


def assert_close(a: TensorDict, b: TensorDict, tolerance: float) -> None:
    """The same relevance, up to a part of its size."""
    for key, value in a.items(True, True):
        assert (value - b[key]).norm() <= tolerance * value.norm(), key


@pytest.mark.parametrize("name", CASES)
def test_attn_lrp_accounts_for_all_relevance(name: str) -> None:
    explain(CASES[name], "attn_lrp", "gradient")


class Precisions(TorchDispatchMode):
    """Takes down the precisions in which anything is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.seen.update(z.dtype for z in tree_leaves(made) if isinstance(z, torch.Tensor))
        return made


@pytest.mark.filterwarnings("ignore:the model does something else on the reference")
@pytest.mark.parametrize("name", CASES)
def test_all_of_a_difference_arrives(name: str) -> None:
    """Many normalise, or make their attention weights, in single precision."""
    module, td, attributed = ready(CASES[name])
    with torch.no_grad(), Precisions() as precisions:
        Model.of(module, attributed.get("in_keys"), attributed.get("out_keys")).run(td.copy())
    tolerance = 1e-9 if torch.float32 not in precisions.seen else ROUNDING.get(name, 1e-5)
    refused = pytest.raises(RuntimeError, match="something else on the reference")
    with refused if name in DECIDES_OFF_THE_TAPE else nullcontext():
        check_difference(module, td, **attributed, target=Target("answer", "argmax"), tolerance=tolerance)


@pytest.mark.parametrize("flow", ["relevance", "gradient"])
@pytest.mark.parametrize("name", ATTENTION)
def test_attention_written_out_and_fused_explain_the_same(name: str, flow: str) -> None:
    relevance = []
    for implementation in ("eager", "sdpa"):
        torch.manual_seed(0)
        explained = explain(CASES[name], "attn_lrp", flow, attn_implementation=implementation)
        relevance.append(explained[flow]["attr"])
    assert_close(*relevance, 1e-6)
