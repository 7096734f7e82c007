"""Exact sums are exact, in any order."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tdhook.datasets.exact import DIGITS, carried, digits_of, value_of

numbers = st.floats(0, 2.0**170, allow_subnormal=False).map(lambda x: x if x > 2.0**-130 else 0.0)


@given(st.lists(numbers, max_size=30), st.permutations(range(30)))
def test_sums_are_those_of_fractions_in_any_order(values: list[float], order: list[int]) -> None:
    x = torch.tensor(values, dtype=torch.float64)
    found = digits_of(x, torch.zeros(len(x), dtype=torch.int64), 1)
    exact = sum(map(Fraction, values), Fraction(0))
    whole = sum(Fraction(int(digit)) * Fraction(2) ** (32 * i - 192) for i, digit in enumerate(found[0]))
    assert whole == exact
    assert float(value_of(found)[0]) == pytest.approx(float(exact), rel=1e-15)
    mixed = x[[i for i in order if i < len(x)]]
    parts = [digits_of(part, torch.zeros(len(part), dtype=torch.int64), 1) for part in mixed.split(7)]
    total = carried(sum(parts, torch.zeros(1, DIGITS, dtype=torch.int64)))
    assert torch.equal(total, found)


def test_each_number_is_added_to_its_cell() -> None:
    torch.manual_seed(0)
    values, cells = torch.rand(1000, dtype=torch.float64), torch.randint(5, (1000,))
    found = value_of(digits_of(values, cells, 6))
    expected = torch.zeros(6, dtype=torch.float64).index_add(0, cells, values)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)


def test_what_is_tiny_is_cut_off_and_what_is_huge_is_refused() -> None:
    none = torch.zeros(3, dtype=torch.int64)
    tiny = torch.tensor([0.0, 2.0**-193, 5e-324], dtype=torch.float64)
    assert value_of(digits_of(tiny, none, 1)).tolist() == [0.0]
    with pytest.raises(OverflowError, match=r"1e\+60 is too large to be summed: relevance is below 2\^180"):
        digits_of(torch.tensor([1.0, 1e60, 0.0], dtype=torch.float64), none, 1)
