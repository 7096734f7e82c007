"""Products of two: each counts by the other half way."""

from __future__ import annotations

import pytest
import torch

from tdhook.relevance.secants.averages import product
from tdhook.relevance.secants.products import matrix_product, pointwise_product
from tdhook.relevance.secants.table import secant_of

from .pairs import assert_all_arrives, integrated, pair_of, random_grads


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype)


def assert_is_integrated(name, function, secant, left: tuple[int, ...], right: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    pair = pair_of(name, function, [draw(*left), draw(*right)], [draw(*left), draw(*right)])
    grads = random_grads(pair)
    found = secant(pair, grads)
    for share, wanted in zip(found, integrated(pair, grads, 1), strict=True):
        assert torch.allclose(share, wanted)
    assert_all_arrives(pair, grads, found)


@pytest.mark.parametrize(
    "left, right", [((3, 4), (3, 4)), ((3, 4), (4,)), ((3, 1), (3, 4)), ((), (3, 4)), ((2, 1, 4), (3, 1))]
)
def test_pointwise(left: tuple[int, ...], right: tuple[int, ...]) -> None:
    assert_is_integrated("mul", torch.mul, pointwise_product, left, right)


@pytest.mark.parametrize(
    "left, right",
    [
        ((3, 4), (4, 2)),
        ((5, 3, 4), (5, 4, 2)),
        ((5, 3, 4), (4, 2)),
        ((3, 4), (5, 4, 2)),
        ((4,), (4, 2)),
        ((3, 4), (4,)),
    ],
)
def test_matrices(left: tuple[int, ...], right: tuple[int, ...]) -> None:
    assert_is_integrated("matmul", torch.matmul, matrix_product, left, right)


def test_a_value_times_itself() -> None:
    torch.manual_seed(0)
    x, start = draw(3, 4), draw(3, 4)
    pair = pair_of("mul", torch.mul, [x, x], [start, start])
    grads = random_grads(pair)
    both = pointwise_product(pair, grads)
    assert torch.allclose(both[0] + both[1], grads[0] * (x + start))


def test_complex_products() -> None:
    torch.manual_seed(0)
    values = [draw(3, dtype=torch.complex128) for _ in range(4)]
    pair = pair_of("mul", torch.mul, values[:2], values[2:], live=[0, 1])
    (g,) = grads = [torch.randn(3, dtype=torch.complex128)]
    found = pointwise_product(pair, grads)
    made = sum((share.conj() * d).real.sum() for share, d in zip(found, pair.steps, strict=True))
    assert torch.isclose(made, (g.conj() * pair.rises[0]).real.sum())


def test_products_of_three() -> None:
    torch.manual_seed(0)
    ends, starts = [draw(3, 4) for _ in range(3)], [draw(3, 4) for _ in range(3)]
    pair = pair_of("einsum", lambda a, b, c: torch.einsum("bi,bj,bk->bi", a, b, c), ends, starts)
    grads = random_grads(pair)
    found = product(pair, grads)
    for share, wanted in zip(found, integrated(pair, grads), strict=True):
        assert torch.allclose(share, wanted, atol=1e-5)
    assert_all_arrives(pair, grads, found)


def test_what_is_linear_in_one_value_is_evaluated_once() -> None:
    torch.manual_seed(0)
    bias, x, start, weight = draw(5), draw(3, 4), draw(3, 4), draw(4, 5)
    calls = []

    def addmm(*args: torch.Tensor) -> torch.Tensor:
        calls.append(args)
        return torch.addmm(*args)

    pair = pair_of("addmm", addmm, [bias, x, weight], [bias, start, weight], live=[1])
    calls.clear()
    grads = random_grads(pair)
    (found,) = secant_of("addmm")(pair, grads)
    assert len(calls) == 1
    assert torch.allclose(found, grads[0] @ weight.T)
