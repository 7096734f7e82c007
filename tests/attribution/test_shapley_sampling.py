"""Shapley values by sampling: orders, pairs of them, strata, and the standard error at which they stop."""

from __future__ import annotations

import pytest
import torch
from enumerated import shapley, worth_of
from tensordict import TensorDict
from torch import nn

from tdhook import References, Target
from tdhook.attribution import Shapley, ShapleySampling
from tdhook.perturbing.coalitions import Orders


def mlp(inputs: int = 5) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, 12), nn.Tanh(), nn.Linear(12, 3)).double()


def observations(*batch: int) -> TensorDict:
    torch.manual_seed(1)
    return TensorDict({"input": 2 * torch.randn(*batch, 5).double()}, list(batch))


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("stratified", [False, True])
def test_the_orders_written_out(antithetic, stratified) -> None:
    net, td = mlp(), observations(3)
    method = ShapleySampling(
        Target("output", 1), permutations=10, antithetic=antithetic, stratified=stratified, seed=3
    )
    orders = Orders(5, 3, antithetic=antithetic, stratified=stratified)
    places = orders.next(10 // orders.block)
    worth = worth_of(lambda z: net(z)[:, 1], td["input"], torch.zeros(5).double(), torch.arange(5))
    expected = torch.zeros(3, 5).double()
    for place in places:
        present: frozenset[int] = frozenset()
        for feature in place.argsort().tolist():
            expected[:, feature] += (worth(present | {feature}) - worth(present)) / len(places)
            present |= {feature}
    found = method.wrap(net)(td)["attr", "input"]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_orders() -> None:
    both = Orders(4, 0, antithetic=True, stratified=False).next(3)
    assert torch.equal(both[::2], 3 - both[1::2])
    shifted = Orders(4, 0, antithetic=False, stratified=True).next(2)
    assert torch.equal(shifted[:4].sort(0).values, torch.arange(4).unsqueeze(1).expand(4, 4))
    assert all(torch.equal(order.sort().values, torch.arange(4)) for order in shifted)
    again = Orders(4, 0, antithetic=False, stratified=True)
    assert torch.equal(torch.cat([again.next(1), again.next(1)]), shifted)


def test_it_stops_at_a_standard_error_that_is_true() -> None:
    """Over many seeds, values are off by as much as the standard error says."""
    net, td = mlp(), observations(6)
    exact = Shapley(Target("output", 0)).wrap(net)(td.clone())["attr", "input"]
    off = []
    for seed in range(60):
        method = ShapleySampling(
            Target("output", 0), error=0.01, permutations=4000, errors=True, antithetic=False, seed=seed
        )
        found = method.wrap(net)(td.clone())
        assert found["standard_error", "input"].amax() <= 0.01
        off.append((found["attr", "input"] - exact) / found["standard_error", "input"].clamp(min=1e-9))
    assert 0.8 < torch.stack(off).square().mean().sqrt() < 1.2


def test_each_element_stops_by_itself() -> None:
    net, td = mlp(), observations(6)
    td["input"][::2] *= 0.01  # almost linear: known at once
    explained = ShapleySampling(Target("output", "all"), error=0.01, permutations=4000, errors=True).wrap(net)
    together = explained(td.clone())
    assert explained.method is not None
    for i in range(6):
        alone = explained(td[i : i + 1].clone())
        torch.testing.assert_close(alone["attr", "input"], together["attr", "input"][i : i + 1])
        torch.testing.assert_close(
            alone["standard_error", "input"], together["standard_error", "input"][i : i + 1]
        )
    grid = explained(td.clone().reshape(2, 3))
    torch.testing.assert_close(grid["attr", "input"].reshape(6, 3, 5), together["attr", "input"])
    rows = 0

    class Counted(nn.Module):
        def forward(self, x):
            nonlocal rows
            rows += len(x)
            return net(x)

    ShapleySampling(Target("output", "all"), error=0.002, permutations=4000).wrap(Counted())(td.clone())
    few, rows = rows, 0
    td["input"][::2] = td["input"][1::2]
    ShapleySampling(Target("output", "all"), error=0.002, permutations=4000).wrap(Counted())(td.clone())
    assert few < 0.8 * rows


def test_standard_errors_over_references() -> None:
    net, td = mlp(), observations(3)
    data = TensorDict({"input": torch.randn(7, 5).double()}, [7])
    options = {"permutations": 20, "errors": True}
    several = ShapleySampling(
        Target("output", 0), baseline=References("sample", samples=2, data=data), **options
    ).wrap(net)(td.clone())
    drawn = References("sample", samples=2, data=data).of({"input": td["input"]}, {"input": 1}, td)
    each = [
        ShapleySampling(Target("output", 0), baseline=one.replaced["input"], **options).wrap(net)(td.clone())
        for one in drawn
    ]
    errors = torch.stack([one["standard_error", "input"] for one in each])
    torch.testing.assert_close(several["standard_error", "input"], errors.square().sum(0).sqrt() / 2)


def test_few_orders_are_said() -> None:
    explained = ShapleySampling(Target("output", 0), error=1e-6, permutations=40).wrap(mlp())
    with pytest.warns(
        UserWarning, match=r"standard error of 3 of 3 elements of the batch is up to .* after 20"
    ):
        explained(observations(3))


def test_one_feature_has_all() -> None:
    net, td = mlp(), observations(3)
    found = ShapleySampling(Target("output", 0), features="whole").wrap(net)(td.clone())["attr", "input"]
    rise = net(td["input"]) - net(torch.zeros(5).double())
    torch.testing.assert_close(found.sum(-1), rise[:, 0])


def test_many_features_come_near() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(40, 8), nn.Tanh(), nn.Linear(8, 1)).double(), torch.randn(2, 40).double()
    groups = torch.arange(40) // 4
    worth = worth_of(lambda z: net(z)[:, 0], x, torch.zeros(40).double(), groups)
    found = ShapleySampling(features=groups, permutations=400).wrap(net)(TensorDict({"input": x}, [2]))
    total = found["attr", "input"].reshape(2, 10, 4).sum(-1)
    torch.testing.assert_close(total, shapley(worth, 10).T, rtol=0, atol=0.02)


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="at least one order of features is asked for, got permutations=0"):
        ShapleySampling(permutations=0)
    with pytest.raises(ValueError, match="a standard error is a positive number, got error=0"):
        ShapleySampling(error=0)
    with pytest.raises(
        ValueError, match="how many orders a standard error takes is seen as it goes, which no graph"
    ):
        ShapleySampling(error=0.1, compile=True)
    with pytest.raises(
        ValueError, match=r"two independent draws, each of 10 orders of the 5 features.*give 20 at"
    ):
        ShapleySampling(Target("output", 0), permutations=10, stratified=True, errors=True).wrap(mlp())(
            observations(2)
        )
