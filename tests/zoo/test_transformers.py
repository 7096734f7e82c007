"""Models of the transformers library, as it ships them: all relevance arrives, whatever they are made of.

Weights and biases are random. Language models explain the most likely next token, others their largest
output; where a model reads token ids, the relevance is that of the embedded tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import Tensor, nn
from torchvision_shim import import_torchvision

from tdhook import Target

from . import transformers_senses, transformers_text
from .checks import check
from .transformers_case import FRAMES, LENGTH, SAMPLES, SIDE, VOCABULARY, Case

import_torchvision()  # which some files of transformers import
transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed; `nox -s zoo` installs it"
)
pytestmark = [
    pytest.mark.zoo,
    pytest.mark.filterwarnings(r"ignore:::transformers\."),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),
    pytest.mark.filterwarnings("ignore:Using a non-tuple sequence for multidimensional indexing"),
]

BATCH = 2
ALL = {case.id: case for case in (*transformers_text.CASES, *transformers_senses.CASES)}
# What no rule can reach, and how the model says so.
OPAQUE = {
    "FNetForSequenceClassification": r"nothing is known of the operation `fft_fftn` in module `.*fourier\.self`",
    "RecurrentGemmaForCausalLM": r"the autograd function `SqrtBoundDerivative` in module `.*rg_lru`",
    "YosoForSequenceClassification": r"the autograd function `YosoCumulation` in module `.*attention\.self`",
}
CASES = {name: case for name, case in ALL.items() if name not in OPAQUE}
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


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    """Models make masks and positions in the default precision on the way."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def build(case: Case, **config: Any) -> nn.Module:
    """The model with random weights and biases."""
    cls = getattr(transformers, case.model)
    model = cls(cls.config_class(**case.config, **config)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def warm_up(module: nn.Module, td: TensorDict) -> None:
    """Run once: batch norms take the statistics of what they see, and some modules keep what they make then."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.train().momentum = 1.0
    with torch.no_grad():
        module(td.copy())
    for norm in norms:
        norm.eval()


def inputs(case: Case, config: Any) -> dict[str, Tensor]:
    """Random values for what the model reads."""
    side = getattr(getattr(config, "vision_config", config), "image_size", SIDE)
    side = side[0] if isinstance(side, tuple) else side
    mels = getattr(config, "num_mel_bins", getattr(config, "input_feat_per_channel", 1))
    spectrum = (FRAMES, mels) if case.model.startswith(("AST", "Speech2Text")) else (mels, FRAMES)
    shapes = {
        "inputs_embeds": (LENGTH, 16),
        "decoder_inputs_embeds": (LENGTH, 16),
        "pixel_values": (3, side, side),
        "input_features": spectrum,
        "input_values": spectrum if case.model.startswith("AST") else (SAMPLES,),
    }
    values: dict[str, Tensor] = {}
    for key in case.reads:
        if key in shapes:
            values[key] = torch.randn(BATCH, *shapes[key])
        else:
            values[key] = torch.randint(3, VOCABULARY, (BATCH, LENGTH))
    return values


def answer(values: Tensor) -> Tensor:
    """What is explained: of outputs for each position those of the last one."""
    return values[:, -1] if values.dim() == 3 else values


def explain(case: Case, composite: str, *flows: str, **config: Any) -> dict[str, TensorDict]:
    """Check the explanation of the model's largest output in each flow."""
    model = build(case, **config)
    module = TensorDictSequential(
        TensorDictModule(model, {key: key for key in case.reads}, [case.output]),
        TensorDictModule(answer, [case.output], ["answer"]),
    )
    td = TensorDict(inputs(case, model.config), batch_size=[BATCH] if case.batched else [])
    warm_up(module, td)
    return check(
        module,
        td,
        in_keys=None if case.sources else [key for key in case.reads if td[key].is_floating_point()],
        target=Target("answer", "argmax"),
        input_modules=[f"0.module.{source}" for source in case.sources],
        flows=flows,
        composite=composite,
    )


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


@pytest.mark.parametrize("flow", ["relevance", "gradient"])
@pytest.mark.parametrize("name", ATTENTION)
def test_attention_written_out_and_fused_explain_the_same(name: str, flow: str) -> None:
    relevance = []
    for implementation in ("eager", "sdpa"):
        torch.manual_seed(0)
        explained = explain(CASES[name], "attn_lrp", flow, attn_implementation=implementation)
        relevance.append(explained[flow]["attr"])
    assert_close(*relevance, 1e-6)


@pytest.mark.parametrize("name", OPAQUE)
def test_what_no_rule_reaches_is_named(name: str) -> None:
    with pytest.raises(NotImplementedError, match=OPAQUE[name]):
        explain(ALL[name], "epsilon_plus", "relevance")
