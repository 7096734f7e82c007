"""Softmax and its kin: logarithmic means, which are exact."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdhook.perturbing.quadrature import gauss_legendre
from tdhook.relevance.secants.shares import log_softmax, logsumexp, softmax, softmin

from .pairs import assert_all_arrives, pair_of, random_grads


def logarithmic_mean(a: Tensor, b: Tensor) -> Tensor:
    """``(a - b) / log(a / b)`` is the integral of ``a ** t b ** (1 - t)``."""
    return sum(weight * a**t * b ** (1 - t) for t, weight in gauss_legendre(16))


def jacobian_of_softmax(x: Tensor, start: Tensor) -> Tensor:
    """``diag(L) - L L^T / sum L``, where ``L`` are the logarithmic means of both softmaxes."""
    means = logarithmic_mean(x.softmax(0), start.softmax(0))
    return means.diag() - means.outer(means) / means.sum()


def test_softmax_by_its_matrix() -> None:
    torch.manual_seed(0)
    x, start, g = (torch.randn(6, dtype=torch.float64) for _ in range(3))
    matrix = jacobian_of_softmax(x, start)
    assert torch.allclose(matrix @ (x - start), x.softmax(0) - start.softmax(0), atol=1e-14)
    (found,) = softmax(pair_of("softmax", torch.softmax, [x, 0], [start, 0]), [g])
    assert torch.allclose(found, matrix.T @ g, atol=1e-14)


CALLS = [
    ("softmin", F.softmin, softmin),
    ("softmax", torch.softmax, softmax),
    ("log_softmax", torch.log_softmax, log_softmax),
    ("logsumexp", torch.logsumexp, logsumexp),
]


@pytest.mark.parametrize("name, function, secant", CALLS)
@pytest.mark.parametrize("dim", [-1, 0, 1])
@pytest.mark.parametrize("size", [1e-9, 1.0, 30.0])
def test_all_arrives(name, function, secant, dim: int, size: float) -> None:
    torch.manual_seed(0)
    x, away = torch.randn(3, 4, 5, dtype=torch.float64), size * torch.randn(3, 4, 5, dtype=torch.float64)
    pair = pair_of(name, function, [x, dim], [x + away, dim])
    grads = random_grads(pair)
    found = secant(pair, grads)
    assert_all_arrives(pair, grads, found)
    # Adding the same to all changes only the logarithm of the sum.
    if name != "logsumexp":
        assert found[0].sum(dim).abs().max() < 1e-12


@pytest.mark.parametrize("name, function, secant", CALLS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_where_both_are_the_same_it_is_the_derivative(name, function, secant, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, dtype=dtype).requires_grad_()
    pair = pair_of(name, function, [x.detach(), -1], [x.detach(), -1])
    (g,) = grads = random_grads(pair)
    (wanted,) = torch.autograd.grad(function(x, -1), x, g)
    assert torch.allclose(secant(pair, grads)[0], wanted, atol=1e-6 if dtype == torch.float32 else 1e-14)


@pytest.mark.parametrize("away", [1e-7, 3e-6, 1e-5, 3e-4, 1e-3, 3e-3, 0.1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_near_both_it_stays_exact(away: float, dtype: torch.dtype) -> None:
    """The series and the quotient meet without a step."""
    torch.manual_seed(0)
    x, step = torch.randn(50, 5).double(), away * torch.randn(50, 5).double()
    x, start = x.to(dtype), (x + step).to(dtype)
    (found,) = softmax(
        pair_of("softmax", torch.softmax, [x, -1], [start, -1]), [torch.eye(5)[0].to(dtype).expand(50, 5)]
    )
    for row in range(50):
        wanted = jacobian_of_softmax(x[row].double(), start[row].double())[0]
        assert torch.allclose(found[row].double(), wanted, atol=1e-8 if dtype == torch.float64 else 3e-6)


def test_masks() -> None:
    torch.manual_seed(0)
    x, start = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    x[:, 3:], start[:, 3:] = -torch.inf, -torch.inf
    pair = pair_of("softmax", torch.softmax, [x, -1], [start, -1])
    grads = random_grads(pair)
    (found,) = softmax(pair, grads)
    (part,) = softmax(
        pair_of("softmax", torch.softmax, [x[:, :3], -1], [start[:, :3], -1]), [grads[0][:, :3]]
    )
    assert torch.allclose(found[:, :3], part, atol=1e-14) and (found[:, 3:] == 0).all()


def test_extremes_stay_finite() -> None:
    x = torch.tensor([[1000.0, -1000.0, 0.0], [0.0, 0.0, 0.0]])
    start = torch.tensor([[-1000.0, 1000.0, 0.0], [1e4, -1e4, 0.0]])
    for name, function, secant in CALLS:
        pair = pair_of(name, function, [x, -1], [start, -1])
        grads = [torch.ones_like(pair.outputs[0])]
        found = secant(pair, grads)
        assert found[0].isfinite().all()
        assert_all_arrives(pair, grads, found, 1e-5)


def test_modules_tell_their_axis() -> None:
    torch.manual_seed(0)
    x, start = torch.randn(3, 4, 5).double(), torch.randn(3, 4, 5).double()
    for module, secant in ((nn.Softmax(1), softmax), (nn.LogSoftmax(1), log_softmax)):
        pair = pair_of(type(module).__name__, module, [x], [start], module=module)
        grads = random_grads(pair)
        assert_all_arrives(pair, grads, secant(pair, grads))


def test_several_axes_of_a_logsumexp() -> None:
    torch.manual_seed(0)
    x, start = torch.randn(3, 4, 5).double(), torch.randn(3, 4, 5).double()
    for keepdim in (False, True):
        pair = pair_of("logsumexp", torch.logsumexp, [x, (0, 2), keepdim], [start, (0, 2), keepdim])
        grads = random_grads(pair)
        assert_all_arrives(pair, grads, logsumexp(pair, grads), 1e-11)
