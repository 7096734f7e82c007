"""How close numbers are that two ways of computing agree on: as close as the dtype that they were computed in."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["TOLERANCE", "assert_close"]

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
"""By dtype, relative to a value and to one."""


def assert_close(actual: Tensor, expected: Tensor, computed_in: torch.dtype | None = None) -> None:
    """Equal shapes and values.

    Args:
        actual: what was found.
        expected: what should be, of the same dtype.
        computed_in: the least precise dtype on the way, where that of the tensors is more precise: a curve has numbers
            of double precision, of outputs that are not.
    """
    tolerance = TOLERANCE[computed_in or actual.dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
