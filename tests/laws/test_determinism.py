"""Every run of the tests draws the same."""

from __future__ import annotations

import random

import pytest
import torch
from drawing import drawing
from hypothesis import find, given, settings
from hypothesis import strategies as st

AT_IMPORT = torch.rand(1).item()


@pytest.fixture(autouse=True)
def _not_exploring(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--hypothesis-profile") == "explore":
        pytest.skip("other examples are wanted")


def test_examples_are_the_same_in_every_clone() -> None:
    found = settings()
    assert found.derandomize and found.database is None and found.deadline is None
    assert drawing(15).max_examples == 15 and drawing(15).derandomize


def test_what_modules_of_tests_draw_is_the_same() -> None:
    assert torch.rand(1).item() == AT_IMPORT


def test_each_example_begins_with_the_same_random_numbers() -> None:
    seen = set()

    @given(st.integers())
    def run(_: int) -> None:
        seen.add((torch.rand(1).item(), random.random()))

    run()
    assert len(seen) == 1


def test_more_is_drawn_where_one_explores() -> None:
    explored = settings.get_profile("explore")
    assert not explored.derandomize and explored.database is None
    before = settings.get_current_profile_name()
    settings.load_profile("explore")
    try:
        assert drawing(15).max_examples == 150
        assert find(st.integers(), lambda number: number > 10) == 11
    finally:
        settings.load_profile(before)
