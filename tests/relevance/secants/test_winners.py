"""Functions that pick: each counts for the part of the way on which it wins."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tdhook.relevance.secants.winners import picked_of, winner

from .pairs import assert_all_arrives, integrated, pair_of, random_grads

CALLS = {
    "maximum": (torch.maximum, 2, ()),
    "minimum": (torch.minimum, 2, ()),
    "max": (torch.max, 1, (-1,)),
    "amax": (torch.amax, 1, (-1,)),
    "sort": (torch.sort, 1, (-1,)),
    "topk": (torch.topk, 1, (2, -1)),
    "kthvalue": (torch.kthvalue, 1, (2, -1)),
    "median": (torch.median, 1, (-1,)),
    "cummax": (torch.cummax, 1, (-1,)),
    "max_pool1d": (F.max_pool1d, 1, (2,)),
    "max_pool2d": (F.max_pool2d, 1, (2,)),
}


def pair_for(name: str, shape: tuple[int, ...]) -> tuple[object, list[Tensor]]:
    torch.manual_seed(0)
    function, count, rest = CALLS[name]
    ends = [torch.randn(*shape, dtype=torch.float64) for _ in range(count)]
    starts = [torch.randn(*shape, dtype=torch.float64) for _ in range(count)]
    pair = pair_of(name, function, [*ends, *rest], [*starts, *rest])
    return pair, random_grads(pair)


@pytest.mark.parametrize("name", sorted(CALLS))
def test_all_arrives(name: str) -> None:
    pair, grads = pair_for(name, (2, 4, 6))
    found = winner(pair, grads)
    assert_all_arrives(pair, grads, found)


@pytest.mark.parametrize("name", ["maximum", "minimum"])
def test_two_share_as_the_way_between_them_goes(name: str) -> None:
    pair, grads = pair_for(name, (30,))
    for share, wanted in zip(winner(pair, grads), integrated(pair, grads), strict=True):
        assert (share - wanted).abs().max() < 2e-3 * grads[0].abs().max()


@pytest.mark.parametrize("name", sorted(CALLS))
def test_where_both_are_the_same_it_is_the_derivative(name: str) -> None:
    pair, grads = pair_for(name, (2, 4, 6))
    pair.starts, pair.before = pair.ends, pair.outputs
    for share, wanted in zip(winner(pair, grads), integrated(pair, grads, 1), strict=True):
        assert torch.allclose(share, wanted)


@pytest.mark.parametrize("name", sorted(CALLS))
def test_some_are_the_same(name: str) -> None:
    pair, grads = pair_for(name, (2, 4, 6))
    starts = [
        torch.where(torch.rand_like(x) < 0.5, x, s) for x, s in zip(pair.ends, pair.starts, strict=True)
    ]
    function, _, rest = CALLS[name]
    pair = pair_of(name, function, [*pair.ends, *rest], [*starts, *rest])
    assert_all_arrives(pair, grads, winner(pair, grads))


def test_ties_are_shared_whole() -> None:
    x, start = torch.tensor([[1.0, 1.0, 0.0]]).double(), torch.tensor([[0.0, 0.0, 0.0]]).double()
    pair = pair_of("amax", torch.amax, [x, -1], [start, -1])
    assert_all_arrives(pair, [torch.ones(1).double()], winner(pair, [torch.ones(1).double()]))


def test_masked_values_win_nothing() -> None:
    x = torch.tensor([[1.0, -torch.inf, 0.5]]).double()
    start = torch.tensor([[-1.0, -torch.inf, 0.7]]).double()
    pair = pair_of("amax", torch.amax, [x, -1], [start, -1])
    (found,) = winner(pair, [torch.ones(1).double()])
    assert found[0, 1] == 0
    assert_all_arrives(pair, [torch.ones(1).double()], [found])


def test_what_is_picked_is_picked_of_others() -> None:
    x = torch.tensor([3.0, 1.0, 2.0]).requires_grad_()
    values, indices = x.sort()
    found = picked_of([x], [values, indices], [torch.tensor([30.0, 10.0, 20.0])])
    assert found[0].tolist() == [10.0, 20.0, 30.0] and torch.equal(found[1], indices)


@pytest.mark.parametrize("name", ["maximum", "minimum", "fmax", "fmin"])
@pytest.mark.parametrize("first", [True, False])
def test_a_constant_that_wins_leaves_the_rest_to_the_other(name: str, first: bool) -> None:
    torch.manual_seed(0)
    x, start, constant = (torch.randn(40, dtype=torch.float64) for _ in range(3))
    pair = pair_of(name, getattr(torch, name), *_in_order(first, x, start, constant), live=[int(first)])
    grads = random_grads(pair)
    found = winner(pair, grads)
    assert_all_arrives(pair, grads, found)
    torch.testing.assert_close(found[0] * (x - start), grads[0] * pair.rises[0])


def _in_order(first: bool, x: Tensor, start: Tensor, constant: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    return ([constant, x], [constant, start]) if first else ([x, constant], [start, constant])


def test_a_constant_that_differs_on_the_reference_wins_where_it_does_on_the_way() -> None:
    torch.manual_seed(0)
    x, start, constant, before = (torch.randn(40, dtype=torch.float64) for _ in range(4))
    pair = pair_of("maximum", torch.maximum, [x, constant], [start, before], live=[0])
    (found,) = winner(pair, [torch.ones_like(x)])
    at = ((torch.arange(4000, dtype=torch.float64) + 0.5) / 4000).unsqueeze(-1)
    wins = torch.lerp(start, x, at) > torch.lerp(before, constant, at)
    torch.testing.assert_close(found, wins.double().mean(0), atol=1e-3, rtol=0.0)


@pytest.mark.parametrize("name", sorted(CALLS))
def test_each_row_counts_as_it_does_alone(name: str) -> None:
    """The way is cut into pieces for values that need it, and for no others."""
    pair, grads = pair_for(name, (8, 2, 6))
    function, _, rest = CALLS[name]
    found = winner(pair, grads)
    for i in range(8):
        ends, starts = ([x[i : i + 1] for x in values] for values in (pair.ends, pair.starts))
        alone = pair_of(name, function, [*ends, *rest], [*starts, *rest])
        for share, wanted in zip(found, winner(alone, [g[i : i + 1] for g in grads]), strict=True):
            torch.testing.assert_close(share[i : i + 1], wanted)
