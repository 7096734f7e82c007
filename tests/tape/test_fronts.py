"""Fronts: what of a tape is one linear map."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tdhook.tape.fronts import Front


def leaf(*shape: int) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64).requires_grad_()


def test_what_comes_by_its_end_goes_on_to_the_source() -> None:
    layer, x = nn.Linear(4, 3).double(), leaf(2, 4)
    z = layer((x - 1) / 2)
    y = z.tanh().sum(1)
    front = Front.of([y], [x])
    assert front is not None and front.shapes == [(2, 3)] and front.breadth == 4
    (there,) = torch.autograd.grad([y], front.edges, [torch.ones(2).double()], retain_graph=True)
    (found,) = torch.autograd.grad(front.edges, [x], [there], retain_graph=True)
    (direct,) = torch.autograd.grad(y.sum(), [x])
    assert torch.equal(found, direct)


def test_copies_are_told_by_their_shapes_and_by_what_they_are_computed_with() -> None:
    layer = nn.Linear(4, 3).double()

    def front(x: Tensor, factor: float | Tensor = 2.0) -> Front:
        found = Front.of([layer(factor * x).tanh()], [x])
        assert found is not None
        return found

    one = front(leaf(2, 4))
    assert front(leaf(10, 4)).is_as(one, 5)
    assert not front(leaf(10, 4)).is_as(one, 4)
    assert not front(leaf(10, 4), 3.0).is_as(one, 5)
    assert front(leaf(10, 4), torch.tensor(2.0)).is_as(front(leaf(2, 4), torch.tensor(2.0)), 5)
    layer = nn.Linear(4, 3).double()
    assert not front(leaf(10, 4)).is_as(one, 5)


def test_none_where_it_would_count_twice() -> None:
    x = leaf(2, 4)
    z = 2 * x
    assert Front.of([(z + 1) * z.tanh()], [x]) is None
    assert Front.of([z.tanh()], [x, z]) is None
    assert Front.of([torch.rand(2)], [x]) is None


def test_of_what_is_not_linear_it_ends_before() -> None:
    x = leaf(2, 4)
    for y in (x * x, x.exp(), x * x.detach(), x / x.detach().sum(1, keepdim=True), 1 / x):
        front = Front.of([y], [x])
        assert front is not None and front.shapes == [(2, 4)] and front.breadth == 0


def test_weights_that_were_overwritten_are_not_looked_at() -> None:
    weight, x = torch.rand(4, 3).double(), leaf(2, 4)
    y = (x @ weight).tanh()
    before = Front.of([y], [x])
    weight.mul_(2)
    after = Front.of([y], [x])
    assert before is not None and after is not None and after.breadth == 0
    assert not after.is_as(before, 1)


def test_copies_that_no_longer_lie_one_after_the_other_are_none() -> None:
    def front(x: Tensor, along: int) -> Front:
        found = Front.of([torch.cat([x, 2 * x], along).tanh()], [x])
        assert found is not None
        return found

    assert front(leaf(10, 4), 1).is_as(front(leaf(2, 4), 1), 5)
    for first in (0, -2):  # all first halves, and then all second ones: of the shape that copies have
        assert not front(leaf(10, 4), first).is_as(front(leaf(2, 4), first), 5)
