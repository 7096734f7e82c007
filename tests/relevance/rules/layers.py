"""The layers that every linear rule is tried on: name, factory, and the shape of one sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from .reference import Explicit, explicit

DTYPE = torch.float64


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=DTYPE, generator=torch.Generator().manual_seed(seed))


class Product(nn.Module):
    """Any number of factors."""

    def forward(self, *factors):
        out = factors[0]
        for factor in factors[1:]:
            out = out * factor
        return out


@dataclass(frozen=True)
class Case:
    """A layer with its weights drawn from a seed of its own, and what goes with it."""

    name: str
    factory: Callable[..., nn.Module]
    in_shape: tuple[int, ...]
    bias: bool

    def __str__(self) -> str:
        return f"{self.name}-{'bias' if self.bias else 'plain'}"

    @cached_property
    def layer(self) -> nn.Module:
        torch.manual_seed(sum(map(ord, str(self))))
        return self.factory(bias=self.bias, dtype=DTYPE)

    @cached_property
    def explicit(self) -> Explicit:
        return explicit(self.layer, self.in_shape)

    def draw(self, signed: bool, *batch: int) -> tuple[Tensor, Tensor]:
        """An input, with some exact zeros if it is not signed, and a relevance of both signs."""
        generator = torch.Generator().manual_seed(7 + signed + 10 * len(batch))
        x = torch.randn(*batch, *self.in_shape, dtype=DTYPE, generator=generator)
        r = torch.randn(*batch, *self.explicit.out_shape, dtype=DTYPE, generator=generator)
        return (x if signed else x.clamp(min=0)), r


def _conv(kind: type[nn.Module], channels: tuple[int, int], kernel, **options) -> Callable[..., nn.Module]:
    return partial(kind, *channels, kernel, **options)


_FACTORIES: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...]]] = {
    "linear": (partial(nn.Linear, 5, 4), (5,)),
    "linear_to_one": (partial(nn.Linear, 3, 1), (3,)),
    "linear_from_one": (partial(nn.Linear, 1, 3), (1,)),
    "conv1d": (_conv(nn.Conv1d, (2, 3), 3), (2, 6)),
    "conv1d_stride_dilation": (_conv(nn.Conv1d, (2, 3), 3, stride=2, dilation=2, padding=2), (2, 7)),
    "conv1d_skips_inputs": (_conv(nn.Conv1d, (2, 2), 2, stride=3), (2, 7)),
    "conv1d_same_even": (_conv(nn.Conv1d, (2, 3), 4, padding="same"), (2, 5)),
    "conv1d_valid": (_conv(nn.Conv1d, (2, 3), 2, padding="valid"), (2, 5)),
    "conv1d_groups": (_conv(nn.Conv1d, (4, 6), 2, groups=2, padding=1), (4, 4)),
    "conv1d_circular": (_conv(nn.Conv1d, (2, 3), 4, padding=3, padding_mode="circular"), (2, 3)),
    "conv1d_reflect": (_conv(nn.Conv1d, (2, 3), 4, padding=2, padding_mode="reflect"), (2, 3)),
    "conv1d_replicate": (_conv(nn.Conv1d, (2, 3), 4, padding=3, padding_mode="replicate"), (2, 3)),
    "conv1d_same_circular": (_conv(nn.Conv1d, (2, 2), 4, padding="same", padding_mode="circular"), (2, 4)),
    "conv2d": (_conv(nn.Conv2d, (2, 3), 3), (2, 4, 4)),
    "conv2d_stride_pad": (_conv(nn.Conv2d, (2, 3), 3, stride=2, padding=1), (2, 5, 4)),
    "conv2d_uneven": (
        _conv(nn.Conv2d, (2, 3), (3, 2), stride=(1, 2), padding=(2, 0), dilation=(2, 1)),
        (2, 4, 5),
    ),
    "conv2d_depthwise": (_conv(nn.Conv2d, (3, 3), 2, groups=3, padding=1), (3, 3, 3)),
    "conv2d_same": (_conv(nn.Conv2d, (2, 2), (2, 3), padding="same", dilation=(1, 2)), (2, 4, 4)),
    "conv2d_circular": (
        _conv(nn.Conv2d, (2, 3), 3, padding=(2, 1), stride=(1, 2), padding_mode="circular"),
        (2, 3, 4),
    ),
    "conv2d_reflect": (
        _conv(nn.Conv2d, (2, 4), 3, padding=(1, 2), groups=2, padding_mode="reflect"),
        (2, 3, 3),
    ),
    "conv2d_replicate": (
        _conv(nn.Conv2d, (2, 2), 3, padding=2, dilation=2, padding_mode="replicate"),
        (2, 3, 3),
    ),
    "conv2d_same_reflect": (
        _conv(nn.Conv2d, (2, 2), (4, 3), padding="same", padding_mode="reflect"),
        (2, 4, 3),
    ),
    "conv3d": (_conv(nn.Conv3d, (2, 2), 2), (2, 3, 3, 3)),
    "conv3d_stride_pad": (
        _conv(nn.Conv3d, (2, 4), (2, 1, 3), stride=(2, 1, 1), padding=(1, 0, 1), groups=2),
        (2, 3, 2, 3),
    ),
    "conv3d_dilation_same": (_conv(nn.Conv3d, (1, 2), 2, padding="same", dilation=(2, 1, 1)), (1, 3, 2, 3)),
    "conv3d_circular": (_conv(nn.Conv3d, (1, 2), 3, padding=1, padding_mode="circular"), (1, 2, 2, 3)),
    "conv3d_replicate": (_conv(nn.Conv3d, (1, 2), 2, padding=1, padding_mode="replicate"), (1, 2, 2, 2)),
    "conv3d_reflect": (_conv(nn.Conv3d, (1, 2), 2, padding=1, padding_mode="reflect"), (1, 2, 2, 2)),
    "transpose1d": (_conv(nn.ConvTranspose1d, (3, 2), 3), (3, 4)),
    "transpose1d_output_padding": (
        _conv(nn.ConvTranspose1d, (2, 3), 2, stride=3, output_padding=2, padding=1),
        (2, 3),
    ),
    "transpose1d_dilation_groups": (
        _conv(nn.ConvTranspose1d, (4, 6), 3, stride=2, dilation=2, groups=2, padding=2),
        (4, 3),
    ),
    "transpose2d": (_conv(nn.ConvTranspose2d, (2, 3), 3, stride=2), (2, 2, 3)),
    "transpose2d_uneven": (
        _conv(
            nn.ConvTranspose2d,
            (4, 2),
            (2, 3),
            stride=(2, 1),
            padding=(0, 2),
            output_padding=(1, 0),
            dilation=(1, 2),
            groups=2,
        ),
        (4, 2, 3),
    ),
    "transpose3d": (_conv(nn.ConvTranspose3d, (2, 1), 2), (2, 2, 2, 2)),
    "transpose3d_stride_pad": (
        _conv(nn.ConvTranspose3d, (2, 2), 2, stride=(1, 2, 2), padding=1, output_padding=(0, 1, 1), groups=2),
        (2, 2, 2, 2),
    ),
}

CASES = [
    Case(name, factory, in_shape, bias)
    for name, (factory, in_shape) in _FACTORIES.items()
    for bias in (False, True)
]
_SMALL = (
    "linear-bias",
    "conv1d_circular-bias",
    "conv2d_stride_pad-plain",
    "conv3d-bias",
    "transpose2d_uneven-bias",
)
SMALL = [case for case in CASES if str(case) in _SMALL]
