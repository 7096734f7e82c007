"""Complex numbers and transforms of Fourier: a complex number is two numbers, each with relevance of its own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

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
