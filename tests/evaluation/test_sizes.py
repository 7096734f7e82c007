"""Features of different sizes: what is large gains nothing by it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from evaluated_models import inputs, linear
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from tdhook import Target
from tdhook.evaluation import (
    GradientTimesInput,
    MaskedPolicy,
    RandomMap,
    insertion_deletion,
    patches,
    perturbation_curve,
)
from tdhook.perturbing.features import Features

TARGET = Target("output", 0)
UNEQUAL = torch.tensor([0, 0, 0, 0, 0, 0, 0, 1, 1, 2, 3, 3])  # 7, 2, 1 and 2 entries


class Total(nn.Module):
    """All entries count alike: through a function of their sum."""

    def __init__(self, function: Any = lambda total: total) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x.flatten(1).sum(1, keepdim=True))


@pytest.mark.parametrize("size", [7, 2, 6, 4, (5, 14)])
@pytest.mark.parametrize("absolute", [False, True])
def test_a_random_map_scores_nothing_where_all_pixels_count_alike(size: Any, absolute: bool) -> None:
    td = TensorDict({"input": torch.ones(50, 1, 14, 14)}, [50])
    curves = perturbation_curve(
        Total(), td, RandomMap(TARGET), groups=patches((1, 14, 14), size), absolute=absolute
    )
    for curve in (curves.most, curves.least):
        torch.testing.assert_close(curve.mean, 196 * (1 - curve.fraction))
    assert curves.between == pytest.approx(0.0, abs=1e-9)
    both = insertion_deletion(
        Total(), td, RandomMap(TARGET), groups=patches((1, 14, 14), size), measure="target", absolute=absolute
    )
    torch.testing.assert_close(both.insertion.mean, 196 * both.insertion.fraction)
    torch.testing.assert_close(both.deletion.mean, 196 * (1 - both.deletion.fraction))


@pytest.mark.parametrize("function", [torch.tanh, torch.square, torch.exp])
def test_nor_where_what_they_add_up_to_is_bent(function: Any) -> None:
    td = TensorDict({"input": torch.full((4000, 12), 1 / 12)}, [4000])
    curves = perturbation_curve(Total(function), td, RandomMap(TARGET), groups=UNEQUAL)
    whole = (curves.most.value[:, 0] - curves.most.value[:, -1]).abs().mean().item()
    assert abs(curves.between) < 0.01 * whole


def test_the_order_goes_by_relevance_per_entry() -> None:
    model, td = linear([1.0, 1.0, 1.0, 2.0]), inputs([1.0, 1.0, 1.0, 1.0])
    curves = perturbation_curve(model, td, GradientTimesInput(), groups=torch.tensor([0, 0, 0, 1]))
    # The last entry alone, a quarter of all, comes before the three others, which add up to more.
    assert curves.most.fraction.tolist() == [0.0, 0.5, 1.0]
    assert curves.most.value.tolist() == [[5.0, 2.0, 0.0]]  # 5, 3 at a quarter, 0
    assert curves.least.value.tolist() == [[5.0, 3.0, 0.0]]  # 5, 2 at three quarters, 0


def test_equal_sizes_are_measured_where_they_are_told() -> None:
    model, td = (
        nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)),
        inputs([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]),
    )
    groups = torch.tensor([0, 0, 1, 1, 2, 2])
    td["attr", "input"] = torch.tensor([[1.0, 1.0, 3.0, 3.0, 2.0, 2.0]])
    curve = perturbation_curve(model, td, groups=groups).most
    kept = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 1, 1], [1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]])
    with torch.no_grad():
        expected = model(td["input"] * kept)[:, 0]
    torch.testing.assert_close(curve.value[0], expected.double(), rtol=1e-5, atol=1e-5)
    assert curve.fraction.tolist() == [0.0, 1 / 3, 2 / 3, 1.0]


def test_entries_that_are_left_alone_do_not_count() -> None:
    td = TensorDict({"input": torch.ones(3, 12)}, [3])
    groups = torch.where(torch.arange(12) < 3, -1, UNEQUAL)
    curves = perturbation_curve(Total(), td, RandomMap(TARGET), groups=groups)
    torch.testing.assert_close(curves.most.value, (3 + 9 * (1 - curves.most.fraction)).expand(3, -1))
    features = Features.of(td, ["input"], groups)
    assert features.extent.tolist() == [4, 2, 1, 2] and not features.alike


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("which", ["most", "least", "random"])
def test_as_much_of_an_observation_is_hidden_whichever_is(which: Any, count: int) -> None:
    class Policy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x * torch.arange(1.0, 13.0)).sum(-1, keepdim=True)

    actor = TensorDictModule(Policy(), ["observation"], ["action"])
    td = TensorDict({"observation": torch.rand(4000, 12)}, [4000])
    policy = MaskedPolicy(
        actor, GradientTimesInput(Target("action", 0)), max(count, 0), which, groups=UNEQUAL
    )
    chosen = policy.hidden(td)
    entries = (chosen.double() @ policy.features.extent.double()).mean().item()
    assert entries == pytest.approx(count * 3, abs=0.25)
    assert count not in (0, 4) or entries == count * 3
