"""Cases of operations that move data."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .cases import (
    ORDER,
    WIDTH,
    Case,
    columns,
    const,
    pictures,
    sequences,
    shaped_for,
    volumes,
)

_NATIVE = torch._C._nn


def _unpool(pool: str, unpool: str):
    def form(h: Tensor) -> Tensor:
        values, where = getattr(F, pool)(shaped_for(pool, h), 2, return_indices=True, ceil_mode=True)
        return getattr(F, unpool)(values, where, 2, output_size=shaped_for(pool, h).shape[2:])

    return form


def moves_cases() -> list[Case]:
    simple = {
        "H": lambda h: h.H.mT,
        "T": lambda h: h.T.t(),
        "adjoint": lambda h: sequences(h).adjoint(),
        "alias": torch.ops.aten.alias,
        "as_tensor": lambda h: torch.as_tensor(h),
        "asarray": lambda h: torch.asarray(h, copy=True, requires_grad=h.requires_grad),
        "as_strided": lambda h: h.as_strided((h.shape[0], 5), (WIDTH, 2), 1),
        "block_diag": lambda h: torch.block_diag(*h.view(-1, 4, 6))[None],
        "broadcast_tensors": lambda h: torch.broadcast_tensors(h[:, None, :3], h[:, 3:6, None])[0],
        "cartesian_prod": lambda h: torch.cartesian_prod(h[0, :4], h[0, 4:8])[None],
        "cdouble": lambda h: h.cdouble().real,
        "channel_shuffle": lambda h: F.channel_shuffle(h.view(-1, 4, 3, 2), 2),
        "combinations": lambda h: torch.combinations(h[0, :6], 2)[None],
        "cpu": lambda h: h.cpu(),
        "contiguous": lambda h: sequences(h).mT.contiguous(),
        "copy": lambda h: torch.empty_like(h).copy_(h),
        "detach": lambda h: h + 0.5 * h.detach(),
        "diag": lambda h: torch.stack([torch.diag(row) for row in sequences(h)]),
        "diag_embed": lambda h: torch.diag_embed(h[:, :5]),
        "diagflat": lambda h: torch.diagflat(h[0])[None],
        "diagonal": lambda h: torch.diagonal(sequences(h), dim1=1, dim2=2),
        "diagonal_scatter": lambda h: torch.diagonal_scatter(sequences(h), h[:, :4], dim1=1, dim2=2),
        "double": lambda h: h.double(),
        "expand": lambda h: h[:, None].expand(-1, 3, -1),
        "expand_as": lambda h: h[:, None].expand_as(h[:, None].repeat(1, 2, 1)),
        "broadcast_to": lambda h: torch.broadcast_to(h[:, None], (h.shape[0], 3, WIDTH)),
        "fill": lambda h: torch.zeros_like(h[0, 0]).expand(2).clone().fill_(h[0, 0]).expand(h.shape[0], 2),
        "fill_diagonal": lambda h: (h[0, :5, None] * h[0, 5:10]).fill_diagonal_(0.0)[None],
        "flip": lambda h: h.flip(-1),
        "fliplr": torch.fliplr,
        "flipud": torch.flipud,
        "im2col": lambda h: _NATIVE.im2col(pictures(h), (2, 2), (1, 1), (0, 0), (1, 1)),
        "index": lambda h: torch.ops.aten.index(h, [None, ORDER]),
        "max_unpool1d": _unpool("max_pool1d", "max_unpool1d"),
        "max_unpool2d": _unpool("max_pool2d", "max_unpool2d"),
        "max_unpool3d": _unpool("max_pool3d", "max_unpool3d"),
        "meshgrid": lambda h: torch.stack(torch.meshgrid(h[0, :3], h[0, 3:6], indexing="ij"))[None],
        "mH": lambda h: sequences(h).mH,
        "mT": lambda h: sequences(h).mT,
        "pad": lambda h: F.pad(sequences(h), (1, 2)),
        "pad_sequence": lambda h: pad_sequence(sequences(h).unbind(0), batch_first=True),
        "pixel_shuffle": lambda h: F.pixel_shuffle(h.view(-1, 4, 2, 3), 2),
        "pixel_unshuffle": lambda h: F.pixel_unshuffle(h.view(-1, 1, 4, 6), 2),
        "positive": lambda h: +h,
        "put": lambda h: h.put(torch.tensor([0, 5]), h[:, :2][0] * 2),
        "ravel": lambda h: h.ravel().view(h.shape),
        "real": lambda h: h.real,
        "repeat": lambda h: h.repeat(1, 2),
        "repeat_interleave": lambda h: h.repeat_interleave(2, dim=1),
        "requires_grad": lambda h: h.requires_grad_().clone(),
        "reshape_as": lambda h: h.reshape_as(sequences(h)),
        "resolve_conj": torch.resolve_conj,
        "resolve_neg": torch.resolve_neg,
        "roll": lambda h: h.roll(3, -1),
        "rot90": lambda h: torch.rot90(sequences(h), 1, (1, 2)),
        "select_scatter": lambda h: torch.select_scatter(h, h[:, 0] * 2, 1, 4),
        "slice_scatter": lambda h: torch.slice_scatter(h, h[:, :3] * 2, 1, 4, 7),
        "squeeze": lambda h: h.view(-1, 1, WIDTH).squeeze(1),
        "take": lambda h: h.take(torch.arange(h.numel()).flip(0)).view(h.shape),
        "take_along_dim": lambda h: h.take_along_dim(columns(h), 1),
        "tile": lambda h: h.tile(1, 2),
        "type_as": lambda h: h.type_as(const(1)),
        "unbind": lambda h: h.unbind(1)[4][:, None],
        "unfold": lambda h: h.unfold(1, 4, 3),
        "unsafe_split_with_sizes": lambda h: torch.unsafe_split_with_sizes(h, (8, 16), 1)[1],
        "unsqueeze": lambda h: h.unsqueeze(1),
        "upsample_nearest1d": lambda h: F.interpolate(sequences(h), scale_factor=2),
        "upsample_nearest2d": lambda h: F.interpolate(pictures(h), scale_factor=2),
        "upsample_nearest3d": lambda h: F.interpolate(volumes(h), scale_factor=2),
        "upsample_nearest_exact1d": lambda h: F.interpolate(
            sequences(h), scale_factor=2, mode="nearest-exact"
        ),
        "upsample_nearest_exact2d": lambda h: F.interpolate(
            pictures(h), scale_factor=2, mode="nearest-exact"
        ),
        "upsample_nearest_exact3d": lambda h: F.interpolate(volumes(h), scale_factor=2, mode="nearest-exact"),
        "view_as": lambda h: h.view_as(sequences(h)),
        "zero": lambda h: h + torch.zeros_like(h).zero_(),
    }
    single = {
        "block_diag",
        "cartesian_prod",
        "combinations",
        "diag",
        "diagflat",
        "fill",
        "fill_diagonal",
        "meshgrid",
        "put",
    }
    unseen = {
        "detach",
        "fill",
        "zero",
        "requires_grad",
        "copy",
        "max_unpool1d",
        "max_unpool2d",
        "max_unpool3d",
    }
    cases = [
        Case(name, "", {"": f}, batch=1 if name in single else 3, shows=None if name in unseen else name)
        for name, f in simple.items()
    ]
    return cases
