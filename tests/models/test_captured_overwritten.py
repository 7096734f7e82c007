"""A layer is what it computed, also where the next one overwrites it."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from tdhook import LRP, Target
from tdhook.attribution import Conductance, Gradient, GradientTimesInput, IntegratedGradients
from tdhook.contexts.attribution import Attribution

TARGET = Target("output", 0)
LAYER = {"input_modules": ["0"], "values": ["0"]}


def explained(method: Attribution, *, inplace: bool) -> TensorDict:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=inplace), nn.Linear(5, 2))
    return method.wrap(net)(TensorDict({"input": torch.randn(3, 4)}, [3]))


@pytest.mark.parametrize(
    "method",
    [
        Gradient(TARGET, signed=True, **LAYER),
        GradientTimesInput(TARGET, **LAYER),
        IntegratedGradients(TARGET, steps=4, **LAYER),
        Conductance(TARGET, steps=4, **LAYER),
        LRP("epsilon", target=TARGET, **LAYER),
    ],
    ids=lambda method: type(method).__name__,
)
def test_a_layer_that_is_overwritten_afterwards(method: Attribution) -> None:
    found, expected = (explained(method, inplace=inplace) for inplace in (True, False))
    for entry in ("attr", "value"):
        torch.testing.assert_close(found[entry, "0"], expected[entry, "0"])
    assert bool((found["value", "0"] < 0).any())
