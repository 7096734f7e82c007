"""Cases of layers as functions: convolutions, pooling, linear layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .cases import (
    WIDTH,
    Case,
    calling,
    const,
    pictures,
    sequences,
    volumes,
)


def layer_cases() -> list[Case]:
    shaped = {1: sequences, 2: pictures, 3: volumes}
    channels = {1: 4, 2: 2, 3: 1}
    cases = []
    for n in (1, 2, 3):
        c, make, size = channels[n], shaped[n], (2,) * n
        w, b, wt = const(3, c, *size), const(3, seed=1), const(c, 3, *size)
        conv, transposed = getattr(F, f"conv{n}d"), getattr(F, f"conv_transpose{n}d")
        cases += [
            Case(
                f"conv{n}d",
                "",
                {
                    "F": lambda h, f=conv, m=make, w=w: f(m(h), w, padding=1),
                    "named": lambda h, f=conv, m=make, w=w: f(input=m(h), weight=w, padding=1),
                },
            ),
            Case(
                f"conv{n}d",
                "bias",
                {
                    "F": lambda h, f=conv, m=make, w=w, b=b: f(m(h), w, b),
                    "named": lambda h, f=conv, m=make, w=w, b=b: f(m(h), bias=b, weight=w),
                },
            ),
            Case(
                f"conv_transpose{n}d",
                "",
                {"": lambda h, f=transposed, m=make, w=wt, b=b: f(m(h), w, b, stride=2)},
            ),
            Case(
                f"avg_pool{n}d",
                "",
                {"F": calling(F, f"avg_pool{n}d", 2, first=make, ceil_mode=True)},
            ),
            Case(
                f"adaptive_avg_pool{n}d",
                "",
                {"F": calling(F, f"adaptive_avg_pool{n}d", 2, first=make)},
            ),
        ]
    up = {
        "linear1d": (sequences, "linear"),
        "bilinear2d": (pictures, "bilinear"),
        "bicubic2d": (pictures, "bicubic"),
        "trilinear3d": (volumes, "trilinear"),
    }
    cases += [
        Case(
            f"upsample_{k}",
            "",
            {"": lambda h, m=m, mode=mode: F.interpolate(m(h), scale_factor=2, mode=mode)},
        )
        for k, (m, mode) in up.items()
    ]
    cases += [
        Case(
            f"upsample_{k}_aa",
            "",
            {"": lambda h, mode=k[:-2]: F.interpolate(pictures(h), size=(2, 2), mode=mode, antialias=True)},
        )
        for k in ("bilinear2d", "bicubic2d")
    ]
    mean, var = const(2, seed=1), const(2, seed=2, low=0.5)
    w, b = const(2, seed=3), const(2, seed=4)
    features, c_bias = const(WIDTH, WIDTH, seed=6), const(WIDTH, seed=7)
    cases += [
        Case(
            "upsample_bilinear",
            "",
            {"": lambda h: F.interpolate(pictures(h), size=(5, 5), mode="bilinear")},
            shows=None,
        ),
        Case("col2im", "", {"": lambda h: F.fold(F.unfold(pictures(h), 2), (3, 4), 2)}),
        Case(
            "convolution",
            "",
            {
                "": lambda h: torch.convolution(
                    pictures(h), const(3, 2, 2, 2), None, (1, 1), (0, 0), (1, 1), False, (0, 0), 1
                )
            },
        ),
        Case(
            "conv2d",
            "live weight",
            {
                "": lambda h: F.conv2d(
                    h[:, :12].view(1, -1, 3, 4), h[:, 12:16].view(-1, 1, 2, 2), groups=h.shape[0]
                ).view(h.shape[0], -1)
            },
            shows="conv2d",
            batch=1,
        ),
        Case(
            "batch_norm",
            "eval",
            {
                "F": lambda h: F.batch_norm(pictures(h), mean, var, w, b),
                "torch": lambda h: torch.batch_norm(pictures(h), w, b, mean, var, False, 0.1, 1e-5, False),
                "written": lambda h: (
                    (pictures(h) - mean[:, None, None])
                    / (var[:, None, None] + 1e-5).sqrt()
                    * w[:, None, None]
                    + b[:, None, None]
                ),
            },
            shows=None,
        ),
        Case("batch_norm", "alone", {"F": lambda h: F.batch_norm(pictures(h), mean, var, w, b)}),
        Case(
            "batch_norm",
            "train",
            {"F": lambda h: F.batch_norm(pictures(h), None, None, w, None, training=True)},
            batch=1,
        ),
        Case(
            "linear",
            "",
            {
                "F": lambda h: F.linear(h, features),
                "matmul": lambda h: h @ features.T,
                "einsum": lambda h: torch.einsum("bi,oi->bo", h, features),
                "mm": lambda h: torch.mm(h, features.T),
                "mv": lambda h: torch.stack([torch.mv(features, row) for row in h]),
                "named": lambda h: F.linear(weight=features, input=h),
                "tensordot": lambda h: torch.tensordot(h, features, ([1], [1])),
            },
            shows=None,
        ),
        Case(
            "linear",
            "bias",
            {
                "F": lambda h: F.linear(h, features, c_bias),
                "addmm": lambda h: torch.addmm(c_bias, h, features.T),
                "sum": lambda h: h @ features.T + c_bias,
                "addmv": lambda h: torch.stack([torch.addmv(c_bias, features, row) for row in h]),
            },
            shows=None,
        ),
        Case("linear", "alone", {"": lambda h: F.linear(h, features, c_bias)}, shows="linear"),
        Case(
            "linear",
            "live weight",
            {
                "F": lambda h: F.linear(h[:, :4], h[:1, 4:].view(5, 4)),
                "matmul": lambda h: h[:, :4] @ h[:1, 4:].view(5, 4).T,
            },
            shows=None,
            batch=1,
        ),
    ]
    return cases
