"""Slopes of functions of one value, and choices between two."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tdhook.relevance.secants.pair import difference
from tdhook.relevance.secants.slopes import choice, filled, quotient, rounded, scaled, slopes
from tdhook.relevance.secants.table import secant_of

from .pairs import assert_all_arrives, integrated, pair_of, random_grads

FUNCTIONS = {
    "relu": torch.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
    "silu": F.silu,
    "softplus": F.softplus,
    "elu": F.elu,
    "leaky_relu": F.leaky_relu,
    "hardswish": F.hardswish,
    "exp": torch.exp,
    "abs": torch.abs,
    "square": torch.square,
    "sin": torch.sin,
}


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(*shape, dtype=dtype), torch.randn(*shape, dtype=dtype)


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_a_slope_is_the_average_derivative(name: str) -> None:
    x, start = draw(3, 4)
    pair = pair_of(name, FUNCTIONS[name], [x], [start])
    grads = random_grads(pair)
    (found,) = slopes(pair, grads)
    assert (found - integrated(pair, grads)[0]).abs().max() < 2e-3 * grads[0].abs().max()
    assert torch.allclose(found * (x - start), grads[0] * pair.rises[0], atol=1e-14)


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_where_both_are_the_same_or_nearly_so_it_is_the_derivative(name: str, dtype: torch.dtype) -> None:
    x, _ = draw(200, dtype=dtype)
    exact = x.double().requires_grad_()
    (derivative,) = torch.autograd.grad(FUNCTIONS[name](exact).sum(), exact)
    for away in (0.0, 1e-30, torch.finfo(dtype).eps, 8 * torch.finfo(dtype).eps):
        start = x * (1 - away) if away < 1e-20 else x - away
        pair = pair_of(name, FUNCTIONS[name], [x], [start])
        (found,) = slopes(pair, [torch.ones_like(x)])
        off = (found.double() - derivative).abs()
        # A piece of a line has an exact quotient, up to what rounds its values.
        assert off.max() < (0.6 if name == "relu" and away > 1e-20 else 1e-4), away


@pytest.mark.parametrize("name", ["atan2", "copysign"])
@pytest.mark.parametrize("first", [True, False])
def test_what_jumps_with_a_sign_is_known_by_its_secant(name: str, first: bool) -> None:
    (x, start), (constant, _) = draw(40), draw(40)
    constant = constant.roll(1)
    ends, starts = ([[y, constant], [constant, y]][not first] for y in (x, start))
    pair = pair_of(name, getattr(torch, name), ends, starts, live=[int(not first)])
    grads = random_grads(pair)
    (found,) = secant_of(name)(pair, grads)
    torch.testing.assert_close(found * (x - start), grads[0] * pair.rises[0])


def test_masked_values_are_no_difference() -> None:
    x = torch.tensor([-torch.inf, 1.0, -torch.inf])
    start = torch.tensor([-torch.inf, 0.5, 0.3])
    (found,) = slopes(pair_of("exp", torch.exp, [x], [start]), [torch.ones(3)])
    assert found.isfinite().all() and found[0] == 0
    assert torch.allclose(found[1], (torch.tensor(1.0).exp() - torch.tensor(0.5).exp()) / 0.5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_of_a_relu_it_is_what_lies_above_zero_of_the_way(dtype: torch.dtype) -> None:
    ends = torch.tensor([2.0, -2.0, 1.0, -1.0, 0.0, 0.0, 3.0, 6e-8, 60000.0, 0.0, torch.inf], dtype=dtype)
    starts = torch.tensor([1.0, -1.0, -3.0, 3.0, 0.0, 1.0, 3.0, -6e-8, 50000.0, -1.0, torch.inf], dtype=dtype)
    (found,) = slopes(pair_of("relu", torch.relu, [ends], [starts]), [torch.ones_like(ends)])
    assert found.tolist() == [1, 0, 0.25, 0.75, 0, 1, 1, 0.5, 1, 0, 0]


def test_differences_of_what_is_no_number_stay_so_but_for_equal_infinities() -> None:
    x, start = (
        torch.tensor([torch.nan, torch.inf, -torch.inf, torch.inf, 1.0]),
        torch.tensor([0.0, torch.inf, -torch.inf, 1.0, 0.5]),
    )
    found = difference(x, start)
    assert found[0].isnan() and found[1:].tolist() == [0.0, 0.0, torch.inf, 0.5]
    assert difference(x[-1:], start[-1:]).tolist() == [0.5]


def test_a_quotient_shares_as_the_product_with_the_reciprocal() -> None:
    (a, a0), (b, b0) = draw(3, 4), (1.0 + torch.rand(3, 4).double(), 1.0 + torch.rand(3, 4).double())
    pair = pair_of("div", torch.div, [a, b], [a0, b0])
    grads = random_grads(pair)
    found = quotient(pair, grads)
    assert_all_arrives(pair, grads, found)
    assert torch.allclose(found[0], grads[0] * (1 / b + 1 / b0) / 2)
    pair = pair_of("div", torch.div, [a, b], [a0, b])
    assert torch.allclose(quotient(pair, grads)[0], grads[0] / b)


def test_a_quotient_whose_denominators_are_far_apart_is_integrated() -> None:
    """As the norm of zero is, ``F.normalize`` clamps it to 1e-12: ``log(1e12)`` and not ``1e12`` of each other."""
    (a, _), b = draw(3, 4), 1.0 + torch.rand(3, 1).double()
    zero, least = torch.zeros_like(a), torch.full_like(b, 1e-12)
    for ends, starts in (([a, b], [zero, least]), ([zero, least], [a, b])):
        pair = pair_of("div", torch.div, ends, starts)
        grads = random_grads(pair)
        found = quotient(pair, grads)
        assert torch.allclose(found[0], grads[0] * (b / 1e-12).log() / b)
        assert_all_arrives(pair, grads, found)


def test_a_quotient_of_large_numbers_is_not_lost() -> None:
    (a, a0), (b, b0) = draw(3, 4), (1.0 + torch.rand(3, 4).double(), 1.0 + torch.rand(3, 4).double())
    values = [1e25 * x.float() for x in (a, b, a0, b0)]
    pair = pair_of("div", torch.div, values[:2], values[2:])
    grads = random_grads(pair)
    expected = pair_of("div", torch.div, [a, b], [a0, b0])
    for got, want in zip(quotient(pair, grads), quotient(expected, [grads[0].double()]), strict=True):
        torch.testing.assert_close(1e25 * got.double(), want, rtol=1e-5, atol=1e-5)


def test_quotients_broadcast() -> None:
    (a, a0), b, b0 = draw(3, 4), torch.full((3, 1), 2.0).double(), torch.rand(3, 1).double() + 1
    pair = pair_of("div", torch.div, [a, b], [a0, b0])
    grads = random_grads(pair)
    found = quotient(pair, grads)
    assert found[1].shape == b.shape
    assert_all_arrives(pair, grads, found)


def test_what_differs_off_the_tape_is_taken_by_what_is_on_it() -> None:
    (a, a0), (mask, mask0) = (
        draw(3, 4),
        ((torch.rand(3, 4) > 0.5).double(), (torch.rand(3, 4) > 0.5).double()),
    )
    pair = pair_of("mul", torch.mul, [a, mask], [a0, mask0], live=[0])
    grads = random_grads(pair)
    (found,) = scaled(pair, grads)
    assert torch.allclose(found * (a - a0), grads[0] * (a * mask - a0 * mask0))


def test_choices_take_turns_where_the_two_meet() -> None:
    """``where(x > 0, x, 0)`` is a ReLU, and counts as one does."""
    x, start = draw(40)
    zero = torch.zeros_like(x)
    pair = pair_of("where", torch.where, [x > 0, x, zero], [start > 0, start, zero], live=[1])
    (found,) = choice(pair, [torch.ones_like(x)])
    relu = slopes(pair_of("relu", torch.relu, [x], [start]), [torch.ones_like(x)])[0]
    assert torch.allclose(found, relu)


def test_a_choice_that_is_the_same_hands_on_and_nothing_is_made_of_what_is_masked() -> None:
    (a, a0), mask = draw(6), torch.tensor([True, False, True, False, True, False])
    g = torch.tensor([1.0, torch.inf, 2.0, torch.nan, 3.0, 4.0], dtype=a.dtype)
    for before in (mask, mask.clone()):
        pair = pair_of("masked_fill", torch.masked_fill, [a, ~mask, 0.0], [a0, ~before, 0.0], live=[0])
        assert filled(pair, [g])[0].tolist() == [1.0, 0.0, 2.0, 0.0, 3.0, 0.0]


def test_choices_that_jump_share_the_jump() -> None:
    (a, a0), (b, b0) = draw(50), draw(50)
    now, before = torch.rand(50) > 0.5, torch.rand(50) > 0.5
    b, b0 = b.roll(1), b0.roll(2)
    pair = pair_of("where", torch.where, [now, a, b], [before, a0, b0])
    grads = random_grads(pair)
    found = choice(pair, grads)
    assert_all_arrives(pair, grads, found)
    both = now & before
    assert torch.equal(found[0][both], grads[0][both]) and (found[1][both] == 0).all()


@pytest.mark.parametrize("by_name", [False, True])
def test_choices_by_a_method(by_name: bool) -> None:
    (a, a0), (b, b0) = draw(50), draw(50)
    b, b0 = b.roll(1), b0.roll(2)
    mask = torch.rand(50) > 0.5
    if by_name:
        pair = pair_of("where", Tensor.where, [a], [a0], condition=mask, other=b)
    else:
        pair = pair_of("where", Tensor.where, [a, mask, b], [a0, mask, b0])
    grads = random_grads(pair)
    found = choice(pair, grads)
    assert torch.equal(found[0], torch.where(mask, grads[0], 0.0))
    assert_all_arrives(pair, grads, found)


def test_what_is_filled_in_counts_nothing() -> None:
    x, start = draw(3, 4)
    mask = torch.rand(3, 4) > 0.5
    pair = pair_of("masked_fill", torch.masked_fill, [x, mask, -torch.inf], [start, mask, -torch.inf])
    grads = random_grads(pair)
    (found,) = filled(pair, grads)
    assert torch.equal(found, torch.where(mask, 0.0, grads[0]))


def test_what_is_filled_in_elsewhere_on_the_reference_still_arrives() -> None:
    x, start = draw(60)
    now, before = torch.rand(60) > 0.5, torch.rand(60) > 0.5
    pair = pair_of("masked_fill", torch.masked_fill, [x, now, 0.0], [start, before, 0.0])
    grads = random_grads(pair)
    assert_all_arrives(pair, grads, filled(pair, grads))


ROUNDED = {
    "remainder": torch.remainder,
    "fmod": torch.fmod,
    "floor_divide": torch.floor_divide,
    "div": lambda a, b: torch.div(a, b, rounding_mode="trunc"),
}


@pytest.mark.parametrize("name", sorted(ROUNDED))
@pytest.mark.parametrize("shape", [(3, 4), (3, 1), (4,)])
def test_steps_of_a_rounded_quotient_are_those_of_the_quotient(name: str, shape: tuple[int, ...]) -> None:
    (a, a0), (b, b0) = draw(3, 4), (0.3 + torch.rand(shape).double(), 0.3 + torch.rand(shape).double())
    pair = pair_of(name, ROUNDED[name], [3 * a, b], [3 * a0, b0])
    grads = random_grads(pair)
    found = rounded(pair, grads)
    assert_all_arrives(pair, grads, found)
    assert [share.shape for share in found] == [a.shape, b.shape]
    if name in ("remainder", "fmod"):  # what is left of a number by one that does not change
        alone = pair_of(name, ROUNDED[name], [3 * a, b], [3 * a0, b], live=[0])
        torch.testing.assert_close(rounded(alone, grads)[0] * 3 * (a - a0), grads[0] * alone.rises[0])
