"""Values that mask: infinite ones, and the least and greatest of a precision."""

import pytest
import torch

from tdhook.tape.masks import masking, masks_in, unmasked


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_least_and_greatest_mask(dtype):
    most = torch.finfo(dtype).max
    x = torch.tensor([1.0, -torch.inf, torch.inf, -most, most, 0.0, torch.nan], dtype=dtype)
    expected = [False, True, True, True, True, False, False]
    assert masking(x).tolist() == expected
    assert masks_in(x).tolist() == expected
    assert unmasked(torch.ones(7), x).tolist() == [1 - flag for flag in expected]


@pytest.mark.parametrize("x", [torch.randn(3), torch.zeros(())], ids=["several", "one"])
def test_nothing_is_made_where_nothing_masks(x):
    assert masks_in(x) is None
    assert unmasked(x, x) is x


def test_what_cannot_be_looked_at_has_masks():
    assert masks_in(torch.zeros(0)).shape == (0,)
    x = torch.tensor([[1.0], [torch.inf]])
    assert torch.vmap(lambda row: unmasked(row, row))(x).tolist() == [[1.0], [0.0]]
