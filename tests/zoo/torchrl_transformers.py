"""Models of torchrl.modules that the transformers library is needed for."""

from __future__ import annotations

import torch
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.modules import (
    DecisionTransformer,
    DecisionTransformerInferenceWrapper,
    DTActor,
    LMHeadActorValueOperator,
    OnlineDTActor,
)
from torchrl.modules.models import GPT2RewardModel
from torchvision_shim import import_torchvision

from tdhook import Target

from .cases import Collection, inputs, ready

import_torchvision()  # some modules of transformers need it

CASES = Collection()
NEEDS = {"needs": ("transformers",)}
SHORT = {"n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 16}
CONFIG = DecisionTransformer.DTConfig(**SHORT, n_inner=12)
KEYS = ["observation", "action", "return_to_go"]


def trajectory():
    return inputs(2, observation=(3, 4), action=(3, 2), return_to_go=(3, 1))


@CASES.add("DecisionTransformer", "DecisionTransformer", **NEEDS)
def _():
    net = DecisionTransformer(4, 2, CONFIG)
    return ready(TensorDictModule(net, KEYS, ["features"])), trajectory(), Target("features", (2, 0))


@CASES.add("DTActor", "DTActor", **NEEDS)
def _():
    return ready(TensorDictModule(DTActor(4, 2, CONFIG), KEYS, ["out"])), trajectory(), Target("out", (2, 0))


for key in ("loc", "scale"):

    @CASES.add(f"OnlineDTActor, its {key}", "OnlineDTActor", **NEEDS)
    def _(key=key):
        model = TensorDictModule(OnlineDTActor(4, 2, CONFIG), KEYS, ["loc", "scale"])
        return ready(model), trajectory(), Target(key, (2, 0))


@CASES.add("DecisionTransformerInferenceWrapper", "DecisionTransformerInferenceWrapper", **NEEDS)
def _():
    actor = TensorDictModule(DTActor(4, 2, CONFIG), KEYS, ["action"])
    model = DecisionTransformerInferenceWrapper(actor, inference_context=2)
    return ready(model), trajectory(), Target("action", 0)


@CASES.add(
    "LMHeadActorValueOperator",
    "LMHeadActorValueOperator",
    input_modules=["module.0.module.0.module.wte"],
    **NEEDS,
)
def _():
    from transformers import GPT2Config, GPT2LMHeadModel

    base = GPT2LMHeadModel(GPT2Config(**SHORT, vocab_size=11, return_dict=False))
    td = inputs(2, input_ids=torch.randint(11, (2, 5)), attention_mask=torch.ones(2, 5).long())
    return ready(LMHeadActorValueOperator(base)), td, Target("state_value", 0)


@CASES.add("GPT2RewardModel", "GPT2RewardModel", input_modules=["module.transformer.wte"], **NEEDS)
def _():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2RewardModel.__new__(GPT2RewardModel)
    nn.Module.__init__(model)
    base = GPT2LMHeadModel(GPT2Config(**SHORT, vocab_size=11, use_cache=False))
    model.transformer, model.lm_head, model.pad_id = base.transformer, nn.Linear(8, 1, bias=False), 0
    td = inputs(2, input_ids=torch.randint(1, 11, (2, 5)), attention_mask=torch.ones(2, 5).long())
    keyed_model = TensorDictModule(model, ["input_ids", "attention_mask"], ["rewards", "end_score"])
    return ready(keyed_model), td, Target("end_score")
