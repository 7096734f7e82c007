"""What is taken down of one run and filled in by another."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tdhook.relevance.propagation.reference import Parted, Reference


def first(reference: Reference, *calls: tuple[str, Tensor]) -> None:
    reference.begin()
    for name, x in calls:
        reference.place(name, [x]).made = [x.shape]


def again(reference: Reference, *calls: tuple[str, Tensor]) -> None:
    with reference.beside():
        for name, x in calls:
            reference.follow(name, [x], lambda x=x: 2 * x)


def test_places_are_filled_in_call_order() -> None:
    reference, x, y = Reference(), torch.ones(2, 3), torch.zeros(2, 3)
    first(reference, ("tanh", x), ("exp", y))
    again(reference, ("tanh", x + 1), ("exp", y + 1))
    assert [place.name for place in reference.places] == ["tanh", "exp"]
    assert torch.equal(reference.places[0].starts[0], x + 1)
    assert torch.equal(reference.places[1].before[0], 2 * (y + 1))
    assert not reference.running


def test_what_is_the_same_is_not_kept() -> None:
    reference, weight = Reference(), torch.ones(3)
    first(reference, ("linear", weight))
    again(reference, ("linear", weight))
    assert reference.places[0].starts == [None]


@pytest.mark.parametrize(
    "calls, message",
    [
        ([("exp", torch.ones(2))], "exp is called there instead of tanh"),
        ([], "tanh is not reached there"),
        ([("tanh", torch.ones(3))], "meets shapes"),
        ([("tanh", torch.ones(2)), ("exp", torch.ones(2))], "where the model has ended"),
    ],
)
def test_runs_that_part(calls: list[tuple[str, Tensor]], message: str) -> None:
    reference = Reference()
    first(reference, ("tanh", torch.ones(2)))
    with pytest.raises(Parted, match=message):
        again(reference, *calls)
    assert not reference.running


def test_another_module_of_the_same_class() -> None:
    reference, x = Reference(), torch.ones(2)
    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    reference.begin()
    reference.place("Linear", [x], one).made = [x.shape]
    with pytest.raises(Parted, match="another Linear is called there"), reference.beside():
        reference.follow("Linear", [x], lambda: x, other)


def test_places_that_data_move_to() -> None:
    reference, index = Reference(), torch.tensor([0, 1])
    reference.begin()
    reference.moved("gather", [torch.ones(2), index])
    with reference.beside():
        reference.moved("gather", [torch.zeros(2), index.clone()])
    with pytest.raises(Parted, match="moves other values"), reference.beside():
        reference.moved("gather", [torch.zeros(2), index.flip(0)])
    reference.decided = 1
    with reference.beside():
        reference.moved("gather", [torch.zeros(2), index.flip(0)])


def test_decisions_are_repeated_where_they_are_taken_over() -> None:
    reference, now, there = Reference(), torch.tensor([1, 0]), torch.tensor([0, 1])
    reference.begin()
    reference.decision(now)
    reference.decision(now == 1)
    for decided, whole, truth in ((0, there, there == 1), (1, now, there == 1), (2, now, now == 1)):
        reference.decided = decided
        with reference.beside():
            assert torch.equal(reference.decision(there), whole)
            assert torch.equal(reference.decision(there == 1), truth)


def test_what_the_second_run_overwrites_is_told() -> None:
    reference, x = Reference(), torch.ones(2)
    first(reference, ("tanh", x))
    y = torch.zeros(2)
    for copied in (False, True):
        with reference.beside():
            reference.follow("tanh", [y], lambda: y + 1)
            y.add_(1)
        assert reference.overwritten is not copied
    assert torch.equal(reference.places[0].starts[0], torch.ones(2))


def test_parts_that_are_run_once_more_are_not_taken_down() -> None:
    reference = Reference()
    reference.begin()
    with reference.aside():
        reference.place("tanh", [torch.ones(2)])
        reference.decision(torch.ones(2))
    assert not reference.places and not reference.decisions
