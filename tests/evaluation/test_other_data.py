"""What means are taken of, where some axes of the batch belong to the features."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from tdhook.attribution import GradientTimesInput
from tdhook.evaluation import infidelity, perturbation_curve, sensitivity_n

MEASURES: dict[str, Callable[..., Any]] = {
    "curves": lambda *given, **options: perturbation_curve(*given, **options).most.value,
    "infidelity": lambda *given, **options: infidelity(*given, draws=5, **options).infidelity,
    "sensitivity-n": lambda *given, **options: sensitivity_n(*given, subsets=5, **options).correlation,
}


@pytest.mark.parametrize("measure", MEASURES.values(), ids=list(MEASURES))
def test_other_data_have_rows_of_their_own(measure: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    td = TensorDict({"input": torch.randn(3, 2, 4).double()}, [3, 2])
    data = TensorDict({"input": torch.randn(5, 2, 4).double()}, [5, 2])
    given = (net, td, GradientTimesInput())
    found = measure(*given, batch_dims=1, baseline="mean", data=data)
    torch.testing.assert_close(found, measure(*given, batch_dims=1, baseline=data["input"].mean(0)))
    assert not torch.equal(found, measure(*given, batch_dims=1, baseline="mean"))
