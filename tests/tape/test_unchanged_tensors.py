"""Tensors are told from what they were, whichever of their values is written to past their version."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tdhook.tape.internals import components_of
from tdhook.tape.unchanged import Unchanged

CHANGES: dict[str, Callable[[Tensor], object]] = {
    "one value": lambda x: x.view(-1)[17].add_(1),
    "the last value": lambda x: x.view(-1)[-1].add_(1),
    "two of a row, in sum the same": lambda x: x[3, :2].copy_(x[3, :2].flip(0)),
    "two of a column, in sum the same": lambda x: x[:2, 3].copy_(x[:2, 3].flip(0)),
    "a row": lambda x: x[5].mul_(2),
    "a column": lambda x: x[:, 5].mul_(2),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("shape", [(8, 9), (80, 90), (70, 81)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_what_is_written_past_the_version_is_seen(
    shape: tuple[int, int], dtype: torch.dtype, change: str
) -> None:
    x = torch.arange(shape[0] * shape[1]).reshape(shape).to(dtype)
    before = Unchanged(x)
    assert before.is_of(x)
    CHANGES[change](x.data)
    assert not before.is_of(x)


def test_one_axis_that_is_no_square_is_looked_at_to_its_end() -> None:
    x = torch.zeros(5003)
    before = Unchanged(x)
    x.data[-1] = 1
    assert not before.is_of(x) and not before.is_of(x.clone())


@pytest.mark.parametrize("component", [0, 1])
def test_places_and_values_of_a_sparse_tensor(component: int) -> None:
    x = torch.tensor([[0.0, 2.0], [3.0, 0.0]]).to_sparse()
    before = Unchanged(x)
    assert before.is_of(x)
    components_of(x)[component].data[..., -1] += 1
    assert not before.is_of(x)
