"""Stretches of rows, against sets of numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tdhook.concepts.spans import joined, none_seen, of_rows, overlap, unseen

rows = st.sets(st.integers(0, 30), max_size=20)


def numbers(spans: Tensor) -> list[int]:
    return [row for begin, end in spans.tolist() for row in range(begin, end)]


@given(rows, rows, st.integers(0, 30), st.integers(0, 30))
def test_spans_are_what_sets_of_rows_are(one: set[int], other: set[int], begin: int, end: int) -> None:
    ours, theirs = (of_rows(torch.tensor(list(x), dtype=torch.int64)) for x in (one, other))
    assert numbers(ours) == sorted(one)
    assert bool((ours[1:, 0] > ours[:-1, 1]).all())  # those that touch are one
    left = [row for a, b in unseen(begin, end, ours) for row in range(a, b)]
    assert left == [row for row in range(begin, end) if row not in one]
    twice = overlap(ours, theirs)
    if twice is None:
        assert not one & other
        assert numbers(joined(ours, theirs)) == sorted(one | other)
    else:
        assert set(range(*twice)) <= one & other and twice[0] == min(one & other)


def test_a_row_is_there_once() -> None:
    with pytest.raises(ValueError, match="row 4 is there twice: a row is counted once"):
        of_rows(torch.tensor([3, 4, 9, 4]))
    assert len(none_seen()) == 0
