"""Models of the transformers library with random weights and biases, and what they read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import Tensor, nn
from torchvision_shim import import_torchvision

from . import transformers_senses, transformers_text
from .transformers_case import FRAMES, LENGTH, SAMPLES, SIDE, VOCABULARY, Case

__all__ = ["CASES", "MARKS", "ready"]

import_torchvision()  # which some files of transformers import
transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed; `nox -s zoo` installs it"
)
MARKS = [
    pytest.mark.zoo,
    pytest.mark.filterwarnings(r"ignore:::transformers\."),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),
    pytest.mark.filterwarnings("ignore:Using a non-tuple sequence for multidimensional indexing"),
]

BATCH = 2
CASES = {case.id: case for case in (*transformers_text.CASES, *transformers_senses.CASES)}


def build(case: Case, **config: Any) -> nn.Module:
    """The model in the default precision, with random weights and biases."""
    cls = getattr(transformers, case.model)
    model = cls(cls.config_class(**case.config, **config)).to(torch.get_default_dtype()).eval()
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


def ready(case: Case, **config: Any) -> tuple[nn.Module, TensorDict, dict[str, Any]]:
    """The model that writes ``"answer"``, what it reads, and which of that gets relevance."""
    model = build(case, **config)
    module = TensorDictSequential(
        TensorDictModule(model, {key: key for key in case.reads}, [case.output]),
        TensorDictModule(answer, [case.output], ["answer"]),
    )
    td = TensorDict(inputs(case, model.config), batch_size=[BATCH] if case.batched else [])
    warm_up(module, td)
    read = None if case.sources else [key for key in case.reads if td[key].is_floating_point()]
    return module, td, {"in_keys": read, "input_modules": [f"0.module.{path}" for path in case.sources]}
