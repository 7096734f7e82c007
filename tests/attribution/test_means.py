"""Means over several explanations, and their spread."""

from __future__ import annotations

import torch

from tdhook.attribution.means import Means


def test_means_and_deviations_are_those_of_torch():
    values = torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 1e6
    means = Means(spread=True)
    for value in values:
        means.add({"x": value})
    torch.testing.assert_close(means.mean["x"], values.mean(0))
    torch.testing.assert_close(means.deviations()["x"], values.std(0))


def test_one_is_its_own_mean():
    value, means = torch.randn(3), Means(spread=True)
    means.add({"x": value})
    assert means.mean["x"] is value
    assert means.deviations() == {}
