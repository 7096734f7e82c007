"""What gives rows other places is told by the tape."""

from __future__ import annotations

import pytest
import torch

from tdhook.tape.picking import Rows, rows_of

ORDER, X = torch.tensor([2, 0, 1, 3]), torch.zeros(4, 5)
ALONG = ORDER.unsqueeze(-1).expand(4, 5)

PICKED = {
    "index": lambda x: x[ORDER],
    "mask": lambda x: x[ORDER > 0],
    "two indices": lambda x: x[ORDER, ORDER],
    "another axis of so many": lambda x: x.expand(3, 4, 5)[:, ORDER],
    "select": lambda x: x.index_select(0, ORDER),
    "gather": lambda x: x.gather(0, ALONG),
    "sort": lambda x: x.sort(0).values,
    "topk": lambda x: x.topk(2, 0).values,
    "masked_select": lambda x: x.masked_select(x > 0),
    "take": lambda x: x.take(ORDER),
    "put": lambda x: X.index_put((ORDER,), x),
    "add": lambda x: X.index_add(0, ORDER, x),
    "copy": lambda x: X.index_copy(0, ORDER, x),
    "scatter": lambda x: X.scatter(0, ALONG, x),
    "scatter_add": lambda x: X.scatter_add(0, ALONG, x),
    "scatter_reduce": lambda x: X.scatter_reduce(0, ALONG, x, "sum"),
}
MOVED = {
    "flip": lambda x: x.flip(0),
    "roll": lambda x: x.roll(1, 0),
    "cat": lambda x: torch.cat([x[1:], x[:1]]),
    "stack": lambda x: torch.stack([x[1], x[0]]),
}
KEPT = {
    "its own place": lambda x: x[torch.arange(4), ORDER],
    "columns": lambda x: x[:, torch.tensor([1, 0])],
    "select of columns": lambda x: x.index_select(1, ORDER),
    "gather of columns": lambda x: x.gather(-1, ALONG),
    "sort of columns": lambda x: x.sort(-1).values,
    "slice": lambda x: x[1:],
    "flip of columns": lambda x: x.flip(1),
    "cat of columns": lambda x: torch.cat([x, x], -1),
}
CASES = [(Rows.PICKED, PICKED), (Rows.MOVED, MOVED), (Rows.KEPT, KEPT)]


@pytest.mark.parametrize(
    "expected, function",
    [pytest.param(rows, one, id=name) for rows, some in CASES for name, one in some.items()],
)
def test_what_becomes_of_rows(expected, function):
    x = torch.randn(4, 5, requires_grad=True)
    assert rows_of([(function(x.sin()) * 2).sum()], 4) is expected
