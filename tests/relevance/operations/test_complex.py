"""Complex numbers and transforms of Fourier: a complex number is two numbers, each with relevance of its own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import Tensor

from tdhook import LRP, Target
from tdhook.relevance.operations.table import OPERATIONS

from .cases import const
from .checks import assert_same, every_flow, relevance_of

W = const(6)
MATRIX = torch.complex(const(6, 6), const(6, 6, seed=1))
WINDOW = torch.hann_window(8, dtype=torch.float64)


def spectrum(h: Tensor) -> Tensor:
    return torch.stft(h.repeat(1, 8), 8, window=WINDOW, return_complex=True)


BALANCED = {
    "transform": lambda h: torch.fft.fft(h).real + torch.fft.rfft(h, n=10).abs(),
    "of two axes": lambda h: (
        torch.fft.fftn(torch.fft.ifftshift(h[:, :, None] * W, 1), dim=(1, 2)).abs().sum(-1)
    ),
    "of time": lambda h: spectrum(h).abs().mean(-1),
    "product": lambda h: ((torch.complex(h, h.roll(1, -1)) * torch.complex(h.tanh(), W)) ** 2).real,
    "matrix": lambda h: F.linear(h.to(torch.complex128), MATRIX).abs(),
    "quotient": lambda h: (torch.complex(h, h.tanh()) / torch.complex(h, W)).imag,
    "exponential": lambda h: torch.view_as_real(torch.exp(torch.complex(h, h))).sum(-1),
}
SAME = {
    "there and back": (lambda h: torch.istft(spectrum(h), 8, window=WINDOW)[:, :6], lambda h: h),
    "convolution": (
        lambda h: torch.fft.irfft(torch.fft.rfft(h) * torch.fft.rfft(W)),
        lambda h: h @ torch.stack([W.roll(i) for i in range(6)]),
    ),
    "as a matrix": (
        lambda h: torch.fft.fft(h).real,
        lambda h: h @ torch.fft.fft(torch.eye(6, dtype=torch.float64)).real,
    ),
    "real part": (lambda h: torch.complex(h, h.tanh()).imag, torch.tanh),
}


@every_flow
@pytest.mark.parametrize("case", BALANCED)
def test_all_relevance_is_accounted_for(case: str, flow: str) -> None:
    assert relevance_of(BALANCED[case], flow).abs().max() > 0


@every_flow
@pytest.mark.parametrize("case", SAME)
def test_explained_as_in_real_numbers(case: str, flow: str) -> None:
    transformed, real = SAME[case]
    assert_same(relevance_of(transformed, flow), relevance_of(real, flow), 1e-8)


TRANSFORMS = sorted(name.removeprefix("fft_") for name in OPERATIONS if name.startswith("fft_"))
KERNELS = ("c2c", "c2r", "r2c")  # exported graphs call them; tested with those


def transform(name: str, h: Tensor) -> Tensor:
    """A transform of ``torch.fft`` of the features ``[batch, 6]``, as real numbers."""
    function = getattr(torch.fft, name)
    flat = name.endswith(("2", "n")) and not name.startswith("fftshift")
    z = function(h.unflatten(1, (2, 3)), dim=(1, 2)) if flat else function(h, dim=-1)
    return (torch.view_as_real(z.resolve_conj()) if z.is_complex() else z).flatten(1)


@pytest.mark.parametrize("flow", ["relevance", "gradient"])
@pytest.mark.parametrize("name", [name for name in TRANSFORMS if name not in KERNELS])
def test_every_transform_is_linear(name: str, flow: str) -> None:
    class Transforms(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return transform(name, x)

    x = torch.randn(3, 6, dtype=torch.float64)
    lrp = LRP("epsilon", target=Target("output", 2), flow=flow, ledger=True, on_unmatched="raise")
    td = lrp.wrap(Transforms())(TensorDict({"input": x}, [3]))
    (row,) = torch.autograd.functional.jacobian(lambda v: transform(name, v[None])[0], x[0])[2][None]
    torch.testing.assert_close(td["attr", "input"], x * row, rtol=1e-9, atol=1e-12)
    assert td["ledger", "gap"].abs().max() < 1e-12
