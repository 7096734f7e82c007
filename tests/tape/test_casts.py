"""Integers whose values are on the tape: what is followed, and what is left alone."""

from __future__ import annotations

import pytest
import torch

from tdhook.tape.casts import Casts, as_numbers

BYTES = torch.arange(12).reshape(3, 4).to(torch.uint8)


def made(function, x=BYTES, *, exact=True):
    """What a function makes of integers, whether it is on the tape, and the derivative of its sum."""
    x = x.clone()
    numbers = as_numbers(x)
    with Casts({"x": x}, {"x": numbers}, exact=exact) as casts:
        result = function(x)
    if not result.requires_grad:
        return result, casts.reached, None
    return result, casts.reached, torch.autograd.grad(result.sum(), numbers)[0]


@pytest.mark.parametrize(
    "function, derivative",
    [
        (lambda x: x.float(), 1.0),
        (lambda x: x / 4, 0.25),
        (lambda x: 2.0 * x, 2.0),
        (lambda x: x.permute(1, 0).unsqueeze(0)[..., :].int().to(torch.float64), 1.0),
        (lambda x: torch.stack(x.chunk(2, 1)).float() * 3, 3.0),
        (lambda x: (x.int() - 5) * 2.0, 2.0),
        (lambda x: x.bfloat16(), 1.0),
    ],
)
def test_numbers_are_on_the_tape(function, derivative):
    result, reached, gradient = made(function)
    assert torch.equal(result, function(BYTES)) and result.dtype is function(BYTES).dtype
    assert reached == {"x"} and torch.equal(gradient, torch.full_like(gradient, derivative))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.ones(20, 2)[x.long()],
        lambda x: torch.nn.functional.embedding(x.long(), torch.ones(20, 2)),
        lambda x: torch.nn.functional.one_hot(x.long(), 12).float(),
        lambda x: (x > 3).float(),
        lambda x: (x - 1 - x.flip(0)).float(),  # wraps around
        lambda x: x.bitwise_and(1).float(),
        lambda x: torch.zeros_like(x, dtype=torch.float32),
        lambda x: x.argmax(-1).float(),
    ],
)
def test_what_is_no_number_of_them_is_left_alone(function):
    result, reached, gradient = made(function)
    assert torch.equal(result, function(BYTES)) and gradient is None and reached == set()


@pytest.mark.parametrize("everywhere", [(), ("x",)])
def test_what_masks_a_value_is_a_number_where_it_is_named(everywhere):
    x, value = BYTES.clone(), torch.ones(3, 4, requires_grad=True)
    numbers = as_numbers(x)
    with Casts({"x": x}, {"x": numbers}, everywhere=everywhere) as casts:
        result = value * x + (x * torch.nn.Parameter(torch.ones(4))).detach()
    assert torch.equal(result, value * BYTES + BYTES)
    assert casts.reached == {"x"}  # by the parameter
    (gradient,) = torch.autograd.grad(result.sum(), numbers, allow_unused=True)
    assert (gradient is None) == (not everywhere)


def test_nothing_is_drawn_twice():
    torch.manual_seed(0)
    expected = torch.rand_like(BYTES, dtype=torch.float32), torch.rand(1)
    torch.manual_seed(0)
    result, reached, _ = made(lambda x: torch.rand_like(x, dtype=torch.float32))
    assert torch.equal(result, expected[0]) and torch.equal(torch.rand(1), expected[1]) and not reached


def test_what_is_written_to_is_written_once():
    def added(x):
        total = torch.ones(3, 4)
        total.add_(x)
        total[0] += x[1]
        return total

    result, reached, gradient = made(added)
    assert torch.equal(result, added(BYTES)) and reached == {"x"}
    assert gradient.sum() == 16


def test_integers_that_were_overwritten_are_no_longer_followed():
    def overwritten(x):
        x[0] = 7
        return x.float()

    result, reached, gradient = made(overwritten)
    assert torch.equal(result, overwritten(BYTES.clone())) and gradient is None and not reached


def test_other_values_in_their_place():
    x = BYTES.clone()
    numbers = torch.full((3, 4), 0.5, requires_grad=True)
    with Casts({"x": x}, {"x": numbers}, exact=False):
        result = x.flip(0).float() / 2
    assert torch.equal(result, torch.full((3, 4), 0.25)) and result.requires_grad


def test_numbers_hold_the_integers():
    assert as_numbers(BYTES).dtype is torch.float32
    assert as_numbers(torch.tensor([2**20])).dtype is torch.float32
    assert as_numbers(torch.tensor([2**24 + 1])).dtype is torch.float64
