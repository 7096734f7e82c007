"""What is reduced by groups: products give each factor an equal part, the others are linear or pick values."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tdhook import Target

from .checks import FLOWS, assert_balanced, assert_same, every_flow, explained

pytestmark = pytest.mark.filterwarnings("ignore:(index|segment)_reduce:UserWarning")

GROUPS = torch.tensor([0, 0, 0, 1, 1, 2])
COUNTS = [3, 2, 1, 0]  # of what is put together in each of four places
LENGTHS = torch.tensor([[3, 2, 1]])


def scattered(kind: str, include: bool, own: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: own(x).scatter_reduce(1, GROUPS.expand_as(x), x, kind, include_self=include)


def scattered_in_place(
    kind: str, include: bool, own: Callable[[Tensor], Tensor]
) -> Callable[[Tensor], Tensor]:
    return lambda x: own(x).scatter_reduce_(1, GROUPS.expand_as(x), x, reduce=kind, include_self=include)


def indexed(kind: str, include: bool, own: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: own(x).index_reduce(1, GROUPS, x, kind, include_self=include)


OWN = {
    "constant": lambda x: x.new_full((len(x), 4), 1.3),
    "activation": lambda x: 1.3 * x[:, :4],
}
WAYS = (scattered, scattered_in_place, indexed)
each_way = pytest.mark.parametrize("way", WAYS)
each_own = pytest.mark.parametrize("own", OWN.values(), ids=OWN)
either = pytest.mark.parametrize("include", [True, False])


class Model(nn.Module):
    def __init__(self, f: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.f = f

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x)


def sample() -> Tensor:
    torch.manual_seed(0)
    return torch.rand(2, 6, dtype=torch.float64) + 0.5


def relevance(f: Callable[[Tensor], Tensor], flow: str, index: int = 0) -> Tensor:
    """That of one output, once the ledger balances and the one without a ledger is the same."""
    x = sample()
    td, module = explained(Model(f), x, flow, target=Target("output", index))
    assert_balanced(td, module)
    bare, _ = explained(Model(f), x, flow, target=Target("output", index), ledger=False)
    assert_same(td["attr", "input"], bare["attr", "input"])
    assert torch.equal(td["output"], f(x))
    return td["attr", "input"]


@every_flow
@each_way
@pytest.mark.parametrize("place", range(3))
def test_each_factor_gets_an_equal_part(way, flow: str, place: int) -> None:
    f = way("prod", False, OWN["constant"])
    expected = (place == GROUPS) * f(sample())[:, place, None] / COUNTS[place]
    torch.testing.assert_close(relevance(f, flow, place), expected)


@every_flow
@each_way
@pytest.mark.parametrize("place", range(4))
def test_what_was_there_is_a_factor_if_it_is_included(way, flow: str, place: int) -> None:
    f = way("prod", True, OWN["activation"])
    part = f(sample())[:, place, None] / (COUNTS[place] + 1)
    expected = part * ((place == GROUPS).long() + (torch.arange(6) == place).long())
    torch.testing.assert_close(relevance(f, flow, place), expected)


@every_flow
@each_way
def test_a_constant_factor_takes_no_part(way, flow: str) -> None:
    f = way("prod", True, OWN["constant"])
    torch.testing.assert_close(relevance(f, flow).sum(1), f(sample())[:, 0])


@every_flow
@each_way
def test_where_nothing_is_put_a_constant_takes_all(way, flow: str) -> None:
    assert not relevance(way("prod", False, OWN["constant"]), flow, 3).any()


@each_way
@each_own
@either
@pytest.mark.parametrize("kind", ["prod", "mean", "amax", "amin"])
def test_both_flows_agree(way, own, include: bool, kind: str) -> None:
    f = way(kind, include, own)
    one, other = (relevance(lambda x: f(x) * torch.tensor([0.3, -1.1, 0.7, 0.9]), flow) for flow in FLOWS)
    assert_same(one, other)


@every_flow
@pytest.mark.parametrize("include, count", [(True, 4), (False, 3)])
def test_a_mean_is_a_weighted_sum(flow: str, include: bool, count: int) -> None:
    f = scattered("mean", include, OWN["constant"])
    torch.testing.assert_close(relevance(f, flow), (GROUPS == 0) * sample() / count)


@every_flow
@pytest.mark.parametrize("kind", ["amax", "amin"])
def test_the_value_that_is_picked_takes_all(flow: str, kind: str) -> None:
    x = sample()
    f = scattered(kind, False, OWN["constant"])
    torch.testing.assert_close(relevance(f, flow), torch.where(x == f(x)[:, :1], x, 0.0) * (GROUPS == 0))


@every_flow
@pytest.mark.parametrize("kind", ["prod", "sum", "mean", "max", "min"])
def test_segments(flow: str, kind: str) -> None:
    def f(x: Tensor) -> Tensor:
        return torch.segment_reduce(x, kind, lengths=LENGTHS.expand(len(x), 3), axis=1)

    found = relevance(f, flow)
    torch.testing.assert_close(found.sum(1), f(sample())[:, 0])
    if kind == "prod":
        torch.testing.assert_close(found[:, :3], (f(sample())[:, :1] / 3).expand(2, 3))


@every_flow
def test_a_product_of_all(flow: str) -> None:
    torch.testing.assert_close(
        relevance(lambda x: x.prod(1, keepdim=True), flow), (sample().prod(1, keepdim=True) / 6).expand(2, 6)
    )


@every_flow
def test_products_of_the_first_ones(flow: str) -> None:
    expected = (torch.arange(6) < 3) * sample()[:, :3].prod(1, keepdim=True) / 3
    torch.testing.assert_close(relevance(lambda x: x.cumprod(1), flow, 2), expected)
