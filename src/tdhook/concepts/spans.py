"""Spans: which row numbers were seen, as stretches ``[spans, 2]`` from one number to that after the last."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["joined", "none_seen", "of_rows", "overlap", "unseen"]


def none_seen() -> Tensor:
    """No spans."""
    return torch.zeros(0, 2, dtype=torch.int64)


def of_rows(rows: Tensor) -> Tensor:
    """The spans of row numbers, in any order.

    Raises:
        ValueError: a row is there twice.
    """
    ordered = rows.sort().values
    twice = ordered[1:][ordered.diff() == 0]
    if len(twice):
        raise ValueError(f"row {int(twice[0])} is there twice: a row is counted once")
    return joined(torch.stack([ordered, ordered + 1], -1))


def joined(*spans: Tensor) -> Tensor:
    """All of some spans that do not overlap, in order; those that touch are one."""
    whole = torch.cat(spans)
    whole = whole[whole[:, 0].argsort()]
    begins = torch.ones(len(whole), dtype=torch.bool)
    begins[1:] = whole[1:, 0] > whole[:-1, 1]
    ends = torch.ones_like(begins)
    ends[:-1] = begins[1:]
    return torch.stack([whole[begins, 0], whole[ends, 1]], -1)


def overlap(one: Tensor, other: Tensor) -> tuple[int, int] | None:
    """The first stretch of rows that is in both."""
    whole = torch.cat([one, other])
    whole = whole[whole[:, 0].argsort(stable=True)]
    both = (whole[1:, 0] < whole[:-1, 1]).nonzero()
    if not len(both):
        return None
    i = int(both[0])
    return int(whole[i + 1, 0]), int(whole[i : i + 2, 1].min())


def unseen(begin: int, end: int, seen: Tensor) -> Iterator[tuple[int, int]]:
    """What of a stretch of rows is in none of the spans."""
    for first, after in seen.tolist():
        if after <= begin:
            continue
        if first >= end:
            break
        if first > begin:
            yield begin, first
        begin = after
    if begin < end:
        yield begin, end
