"""Intervals hold the mean as often as they say, of elements and of trajectories."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from evaluated_models import network, random_inputs
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tdhook.evaluation import (
    Gradient,
    GradientTimesInput,
    ReturnLost,
    insertion_deletion,
    interval,
    perturbation_curve,
    randomisation,
    sensitivity,
)
from tdhook.evaluation.intervals import student
from tdhook.targets import Target

OUTPUT = Target("output", 0)

finite = st.floats(-1e3, 1e3, allow_nan=False)


@pytest.mark.parametrize(
    "level, freedom, value",
    [
        (0.95, 1, 12.7062047362),
        (0.95, 2, 4.3026527297),
        (0.95, 10, 2.2281388520),
        (0.99, 5, 4.0321429836),
        (0.5, 3, 0.7648923284),
        (0.95, 10**6, 1.9599663),
    ],
)
def test_students_distribution_is_that_of_tables(level: float, freedom: int, value: float) -> None:
    assert student(level, freedom) == pytest.approx(value, rel=1e-6)


def test_students_interval_by_hand() -> None:
    found = interval(torch.tensor([1.0, 2.0, 3.0, 6.0]), how="t")
    # Mean 3, variance 14 / 3, three degrees of freedom.
    reach = 3.1824463053 * (14 / 3 / 4) ** 0.5
    assert found.mean.item() == 3.0 and found.count == 4 and found.level == 0.95
    assert found.low.item() == pytest.approx(3 - reach) and found.high.item() == pytest.approx(3 + reach)
    assert found.to_dict() == {
        "mean": 3.0,
        "low": found.low.item(),
        "high": found.high.item(),
        "level": 0.95,
        "count": 4,
    }
    assert str(found) == "3 [-0.437, 6.44]"
    assert str(interval(torch.rand(5, 2), trailing=1)) == "intervals of shape [2]"


@pytest.mark.parametrize("how, least", [("bootstrap", 0.91), ("t", 0.925)])
def test_intervals_hold_the_mean_as_often_as_they_say(how: Any, least: float) -> None:
    """Thirty exponential values, a thousand times: their mean is 1."""
    values = torch.distributions.Exponential(1.0).sample((60, 1000))
    found = interval(values, trailing=1, how=how, draws=500)
    held = ((found.low <= 1.0) & (found.high >= 1.0)).double().mean().item()
    assert least < held < 0.97


@pytest.mark.parametrize("how", ["bootstrap", "t"])
def test_trajectories_count_as_one(how: Any) -> None:
    """Steps of a trajectory share most of what they have: taken for independent, intervals are too narrow."""
    shared = torch.randn(40, 1, 500)
    values = (shared + 0.3 * torch.randn(40, 25, 500)).flatten(0, 1)
    trajectories = torch.arange(40).repeat_interleave(25)
    alone, together = (
        interval(values, trailing=1, how=how, trajectories=given, draws=400) for given in (None, trajectories)
    )

    def held(found: Any) -> float:
        return ((found.low <= 0) & (found.high >= 0)).double().mean().item()

    assert alone.count == 1000 and together.count == 40
    assert torch.equal(alone.mean, together.mean)
    assert held(alone) < 0.5 and 0.91 < held(together) < 0.98


@pytest.mark.parametrize("how", ["bootstrap", "t"])
def test_trajectories_of_one_step_are_elements(how: Any) -> None:
    values = torch.rand(2, 6)
    apart = interval(values, how=how)
    named = interval(values, how=how, trajectories=torch.arange(12).reshape(2, 6))
    assert torch.equal(apart.low, named.low) and torch.equal(apart.high, named.high)


def test_trajectories_of_different_lengths_have_the_mean_of_all_steps() -> None:
    values = torch.tensor([0.0, 0.0, 0.0, 4.0])
    found = interval(values, how="t", trajectories=torch.tensor([7, 7, 7, 2]))
    assert found.mean.item() == 1.0 and found.count == 2
    # What they add to the mean: -3 and 3; sqrt(18 * 2 / 1) / 4.
    assert (found.high - found.mean).item() == pytest.approx(12.7062047362 * 6 / 4)


@given(
    values=st.lists(finite, min_size=2, max_size=30),
    how=st.sampled_from(["bootstrap", "t"]),
    scale=st.floats(0.1, 10),
    shift=finite,
)
def test_intervals_move_and_grow_with_values(
    values: list[float], how: Any, scale: float, shift: float
) -> None:
    x = torch.tensor(values, dtype=torch.float64)
    found, moved = (interval(each, how=how, draws=100) for each in (x, scale * x + shift))
    torch.testing.assert_close(moved.low, scale * found.low + shift, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(moved.high, scale * found.high + shift, rtol=1e-6, atol=1e-6)
    assert found.low <= found.high
    if how == "bootstrap":
        assert x.min() <= found.low and found.high <= x.max()


def test_axes_behind_the_batch_have_intervals_of_their_own_and_seeds_decide() -> None:
    values = torch.rand(3, 5, 2)
    random = torch.get_rng_state()
    found, again, other = (interval(values, trailing=1, seed=seed) for seed in (0, 0, 1))
    assert found.mean.shape == found.low.shape == found.high.shape == (2,)
    assert found.low[1] == interval(values[..., 1]).low
    assert torch.equal(found.low, again.low) and not torch.equal(found.low, other.low)
    assert torch.equal(torch.get_rng_state(), random)
    assert bool((interval(values, 0.5, trailing=1).low >= found.low).all())


@pytest.mark.parametrize(
    "values, options, message",
    [
        (
            torch.rand(4),
            {"level": 95},
            "level is a share of intervals, above 0 and below 1 as 0.95 is; got 95",
        ),
        (torch.rand(4), {"how": "normal"}, "how='normal' is neither 'bootstrap' nor 't'"),
        (torch.rand(4), {"draws": 0}, "a bootstrap draws at least once, got draws=0"),
        (torch.rand(()), {}, "at least two elements or trajectories; there is 1 element"),
        (torch.rand(3), {"trajectories": torch.zeros(3)}, "there is 1 trajectory"),
        (torch.tensor([1.0, torch.nan]), {}, "there are NaN or infinite values"),
        (
            torch.rand(3),
            {"trajectories": torch.zeros(4)},
            r"trajectories of shape \[4\] for figures of batch size \[3\]",
        ),
    ],
)
def test_errors(values: Tensor, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        interval(values, **options)


def test_every_result_has_intervals_of_its_figures() -> None:
    model, td = network(), random_inputs(4, 3)
    trajectories = torch.arange(4)[:, None].expand(4, 3)
    curves = perturbation_curve(model, td, GradientTimesInput(OUTPUT))
    areas = curves.intervals(trajectories=trajectories)
    assert list(areas) == ["most", "least", "between"] and areas["most"].count == 4
    assert areas["between"].mean.item() == pytest.approx(curves.between)
    assert areas["most"].mean.item() == pytest.approx(curves.most.area)
    at_points = curves.most.intervals(0.9, how="t")["value"]
    torch.testing.assert_close(at_points.mean, curves.most.mean)
    assert at_points.level == 0.9
    both = insertion_deletion(model, td, GradientTimesInput(OUTPUT))
    assert both.intervals()["insertion"].mean.item() == pytest.approx(both.insertion.area)
    noisy = sensitivity(model, td, Gradient(OUTPUT), draws=2)
    assert {k: v.mean.item() for k, v in noisy.intervals().items()} == pytest.approx(noisy.to_dict())
    checks = randomisation(model, td, Gradient(OUTPUT))
    torch.testing.assert_close(checks.intervals()["cosine"].mean, checks.mean("cosine"))
    seen = torch.tensor([3.0, 5.0, 7.0])
    lost = ReturnLost(1, 4, seen, seen - 2, seen, seen - 1).intervals()
    # Episodes are the same ones: what is lost in each of them is known better than their returns are.
    assert lost["lost, most"].low.item() == lost["lost, most"].high.item() == 2.0
    assert lost["most"].low < lost["most"].high
