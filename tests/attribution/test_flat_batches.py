"""Models of fixed rank in batches of several axes: what the attempt with all axes left behind is forgotten."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from tdhook import LRP, Target

TARGET = Target("output", "argmax")


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).double()


@pytest.fixture
def td() -> TensorDict:
    torch.manual_seed(1)
    return TensorDict({"input": torch.randn(2, 3, 1, 8, 8).double()}, [2, 3])


METHODS = {
    "values": LRP("epsilon_plus", target=TARGET, ledger=True),
    "differences": LRP("deeplift", target=TARGET, baseline=0.1, ledger=True),
    "without a ledger": LRP("deeplift", target=TARGET, baseline=0.1),
}


@pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))
def test_the_first_call_is_that_of_the_rows(method: LRP, model: nn.Module, td: TensorDict) -> None:
    explained = method.wrap(model)
    found = explained(td.clone())
    rows = method.wrap(model)(td.reshape(-1))
    torch.testing.assert_close(found["attr", "input"].flatten(0, 1), rows["attr", "input"])
    if method.ledger:
        torch.testing.assert_close(found["ledger"].reshape(-1)["absorbed"], rows["ledger", "absorbed"])
        convolutions = [entry for entry in explained.ledger.entries if entry.name == "Conv2d"]
        assert len(convolutions) == 1


def test_a_plan_tells_each_layer_once(model: nn.Module, td: TensorDict) -> None:
    plan = LRP("epsilon_plus", target=TARGET).plan(model, td)
    assert [row.path for row in plan if row.path] == ["0", "1", "2", "3"]
