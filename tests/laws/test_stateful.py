"""A model that remembers does under explanation what it does without: each call is made once, as far as it can tell."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from stateful import KINDS, Net
from tensordict import TensorDict
from torch import Tensor, nn

from tdhook import LRP, Target

OVERWRITING = {"never": None, "from the first call": 0, "from the second call": 2}


def seeded() -> None:
    """Begin with the same random numbers, those that all share."""
    torch.manual_seed(7)
    random.seed(7)
    np.random.seed(7)


def outputs(run: Any) -> list[Tensor]:
    """Of four calls, each of a larger batch."""
    seeded()
    inputs = [torch.randn(n, 4, generator=torch.Generator().manual_seed(n)) for n in (2, 3, 4, 5)]
    return [run(x).detach().clone() for x in inputs]


@pytest.mark.parametrize("overwrites", OVERWRITING.values(), ids=OVERWRITING)
@pytest.mark.parametrize("composite", ["epsilon_plus", "epsilon_plus_flat"])
@pytest.mark.parametrize("name", KINDS)
def test_each_call_is_the_plain_one(name: str, composite: str, overwrites: int | None) -> None:
    expected = outputs(Net(*KINDS[name], overwrites))
    model = Net(*KINDS[name], overwrites)
    explained = LRP(composite, target=Target("output", 0), on_unmatched="ignore").wrap(model)
    found = outputs(lambda x: explained(TensorDict({"input": x}, [len(x)]))["output"])
    for ours, plain in zip(found, expected, strict=True):
        assert torch.equal(ours, plain)


@pytest.mark.parametrize("name", KINDS)
def test_looking_at_a_model_changes_nothing(name: str) -> None:
    expected = outputs(Net(*KINDS[name], 0))
    model = Net(*KINDS[name], 0)
    td = TensorDict({"input": torch.randn(3, 4)}, [3])
    LRP("epsilon_plus_flat", target=Target("output", 0), on_unmatched="ignore").plan(model, td)
    for ours, plain in zip(outputs(model), expected, strict=True):
        assert torch.equal(ours, plain)


@pytest.mark.parametrize("name", KINDS)
def test_other_batch_shapes_are_tried_out_unnoticed(name: str) -> None:
    """A convolution takes one batch axis: with two the model fails, and is run with one."""

    class Conv(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net(*KINDS[name], None)
            self.conv = nn.Conv1d(1, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.net(x).unsqueeze(-2))[..., 0, :]

    model, plain, x = Conv(), Conv(), torch.randn(2, 3, 2, 4)
    plain.load_state_dict(model.state_dict())
    seeded()
    expected = [plain(each.flatten(0, 1)).reshape(3, 2, 2) for each in x]
    explained = LRP("epsilon_plus", target=Target("output", 0), on_unmatched="ignore").wrap(model)
    seeded()
    found = [explained(TensorDict({"input": each}, [3, 2]))["output"] for each in x]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
