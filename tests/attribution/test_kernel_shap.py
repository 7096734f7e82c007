"""Kernel SHAP: exact where all coalitions fit, near where they are drawn, complete in any case."""

from __future__ import annotations

import math

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from tdhook import Target
from tdhook.attribution import KernelShap, Shapley
from tdhook.perturbing.coalitions import kernel_coalitions


def mlp(inputs: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, 12), nn.Tanh(), nn.Linear(12, 3)).double()


def observations(rows: int, features: int) -> TensorDict:
    torch.manual_seed(1)
    return TensorDict({"input": torch.randn(rows, features).double()}, [rows])


def test_drawn_coalitions_come_nearer() -> None:
    net, td = mlp(10), observations(4, 10)
    exact = Shapley(Target("output", "all")).wrap(net)(td.clone())["attr", "input"]
    off = []
    for coalitions in (60, 600, 1022):
        found = KernelShap(Target("output", "all"), coalitions=coalitions, ledger=True).wrap(net)(td.clone())
        assert found["ledger", "gap"].abs().amax() < 1e-10
        off.append(float((found["attr", "input"] - exact).abs().amax()))
    assert off[0] > off[1] > off[2]
    assert off[1] < 0.05
    assert off[2] < 1e-10


def test_a_linear_model_is_known_from_few() -> None:
    net, td = nn.Linear(30, 2).double(), observations(3, 30)
    found = KernelShap(Target("output", 1), coalitions=80).wrap(net)(td.clone())["attr", "input"]
    torch.testing.assert_close(found, td["input"] * net.weight[1].detach())


def test_weights_are_those_of_the_kernel() -> None:
    present, weight = kernel_coalitions(5, 100, 0)
    size = present.sum(1)
    kernel = torch.tensor([0, 4 / (5 * 4), 4 / (10 * 2 * 3), 4 / (10 * 3 * 2), 4 / (5 * 4)]).double()[size]
    torch.testing.assert_close(weight / weight.sum(), kernel / kernel.sum(), rtol=1e-6, atol=0)
    for most in (40, 1000, 4000):
        drawn, weight = kernel_coalitions(20, most, 0)
        assert len(drawn) == len(weight) == most
        share = torch.zeros(21).double().index_add(0, drawn.sum(1), weight)[1:20]
        expected = torch.tensor([1 / (k * (20 - k)) for k in range(1, 20)]).double()
        known = (
            share > 0
        )  # of 40 coalitions those of one feature and of all but one, as in all of them together
        expected = expected / expected.sum()
        torch.testing.assert_close(share[known], expected[known], rtol=0, atol=0.02)
    assert torch.equal(drawn[2700::2], ~drawn[2701::2])


@pytest.mark.parametrize("count", range(2, 9))
def test_sizes_that_fit_are_there_whole(count: int) -> None:
    """From one feature and all but one inwards, each coalition once."""
    for most in range(2 * count, 2**count):
        present, weight = kernel_coalitions(count, most, 0)
        assert len(present) == len(weight) <= most
        assert weight.sum() <= 1 + 1e-12
        sizes, left = present.sum(1), most
        for size in range(1, count // 2 + 1):
            both = {size, count - size}
            left -= len(both) * math.comb(count, size)
            if left < 0:
                break
            for each in both:
                assert len(present[sizes == each].unique(dim=0)) == math.comb(count, each)


@pytest.mark.parametrize("count", [2, 3, 7, 20])
def test_twice_as_many_as_features_tell_these_apart(count: int) -> None:
    found = KernelShap(Target("output", 0), coalitions=2 * count).wrap(mlp(count))(observations(2, count))
    assert found["attr", "input"].isfinite().all()


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="at least two coalitions are asked for, got coalitions=1"):
        KernelShap(coalitions=1)
    with pytest.raises(ValueError, match="8 coalitions do not tell 20 features apart: give more coalitions"):
        KernelShap(Target("output", 0), coalitions=8).wrap(mlp(20))(observations(2, 20))
