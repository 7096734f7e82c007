"""Cases of operations that take the largest."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .cases import (
    WIDTH,
    Case,
    const,
    pictures,
    shaped_for,
)


def winner_cases() -> list[Case]:
    pools = [f"{kind}_pool{n}d" for kind in ("max", "adaptive_max") for n in (1, 2, 3)]
    reduced = {
        "amax": lambda h: h.amax(1, keepdim=True),
        "amin": lambda h: h.amin(1, keepdim=True),
        "aminmax": lambda h: torch.aminmax(h, dim=1, keepdim=True).max,
        "cummax": lambda h: h.cummax(1).values,
        "cummin": lambda h: h.cummin(1).values,
        "kthvalue": lambda h: h.kthvalue(3, 1, keepdim=True).values,
        "median": lambda h: h.median(1, keepdim=True).values,
        "nanmedian": lambda h: h.nanmedian(1, keepdim=True).values,
        "mode": lambda h: torch.mode(h, 1, keepdim=True).values,
        "msort": lambda h: torch.msort(h),
        "sort": lambda h: h.sort(1).values,
        "topk": lambda h: h.topk(3, 1).values,
        "fmax": lambda h: torch.fmax(h, h.roll(1, -1)),
        "fmin": lambda h: torch.fmin(h, h.roll(1, -1)),
        "minimum": lambda h: torch.minimum(h, h.roll(1, -1)),
        "min": lambda h: h.min(1, keepdim=True).values,
        "fractional_max_pool2d": lambda h: F.fractional_max_pool2d(
            pictures(h), 2, output_size=(2, 2), _random_samples=const(h.shape[0], 2, 2, low=0)
        ),
        "fractional_max_pool3d": lambda h: F.fractional_max_pool3d(
            h.view(-1, 1, 2, 3, 4).repeat(1, 1, 2, 2, 2),
            2,
            output_size=2,
            _random_samples=const(h.shape[0], 1, 3, low=0),
        ),
    }
    return [
        *(Case(name, "", {"": f}) for name, f in reduced.items()),
        *(Case(name, "", {"": partial(_pooled, name)}) for name in pools),
        Case(
            "maximum",
            "",
            {
                "torch": lambda h: torch.maximum(h, h.roll(1, -1)),
                "max": lambda h: torch.max(h, h.roll(1, -1)),
                "fmax": lambda h: torch.fmax(h, h.roll(1, -1)),
                "out": lambda h: torch.maximum(h, h.roll(1, -1), out=torch.empty_like(h)),
            },
            shows=None,
        ),
        Case("maximum", "alone", {"": lambda h: torch.maximum(h, h.roll(1, -1))}, shows="maximum"),
        Case(
            "max",
            "",
            {
                "method": lambda h: h.max(1).values[:, None],
                "torch": lambda h: torch.max(h, dim=1, keepdim=True)[0],
            },
        ),
        Case(
            "max",
            "as amax",
            {
                "method": lambda h: h.max(1).values[:, None],
                "amax": lambda h: h.amax(1, keepdim=True),
                "topk": lambda h: h.topk(1, 1)[0],
                "sort": lambda h: h.sort(1, descending=True)[0][:, :1],
                "pool": lambda h: F.max_pool1d(h[:, None], WIDTH)[:, 0],
            },
            shows=None,
        ),
        Case(
            "max_pool2d",
            "padded",
            {
                "F": lambda h: F.max_pool2d(pictures(h), 3, stride=1, padding=1),
                "with indices": lambda h: F.max_pool2d(
                    pictures(h), 3, stride=1, padding=1, return_indices=True
                )[0],
            },
        ),
    ]


def _pooled(name: str, h: Tensor) -> Tensor:
    shaped = shaped_for(name, h)
    size = 1 if "adaptive" in name else (1, 2, 2) if "3d" in name else 2
    return getattr(F, name)(shaped, size)
