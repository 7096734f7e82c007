"""What autocast computes in, and in what it is to compute again."""

from __future__ import annotations

import torch

from tdhook.tape.precision import PLAIN, as_computed, precision


def test_it_is_as_it_was() -> None:
    x = torch.ones(2, 2)
    assert precision() == PLAIN
    with torch.autocast("cpu", torch.bfloat16):
        low = precision()
        with as_computed(PLAIN):
            assert precision() == PLAIN and (x @ x).dtype is torch.float32
        assert precision() == low and (x @ x).dtype is torch.bfloat16
        with torch.autocast("cpu", torch.float16), as_computed(low):
            assert (x @ x).dtype is torch.bfloat16
    with as_computed(low):
        assert (x @ x).dtype is torch.bfloat16
    assert precision() == PLAIN
