"""Stabilisers: what is computed from them can be differentiated, as often as wanted."""

import math

import numpy
import pytest
import torch

from tdhook.relevance.propagation.stabilisers import (
    checked,
    left_of,
    moved_away,
    number,
    plain_quotient,
    quotient,
    rounding,
    stabilize,
)

STABILISERS = {
    "stabilize": lambda z: stabilize(z, 1e-3),
    "a callable": lambda z: stabilize(z, lambda x: x + 1e-3 * x.sign()),
    "stabilize by rounding": lambda z: stabilize(z, rounding),
    "moved_away": lambda z: moved_away(z, 1e-3),
    "rounding": rounding,
}
every = pytest.mark.parametrize("stabilise", STABILISERS.values(), ids=STABILISERS)


def numbers(*shape):
    # Away from zero, where the sign jumps.
    x = torch.randn(*shape, dtype=torch.float64)
    return x + 0.5 * x.sign()


@every
def test_its_gradient_is_one(stabilise):
    x = numbers(5).requires_grad_()
    (stabilise(x) * 3).sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, 3))


@every
def test_a_ratio_has_first_and_second_derivatives(stabilise):
    x = numbers(5).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: z**2 / stabilise(z), x)
    assert torch.autograd.gradgradcheck(lambda z: z**3 / stabilise(z), x)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # torch's own, in forward mode
@every
def test_function_transforms_differentiate_it(stabilise):
    x = numbers(4, 5)
    expected = 3 * torch.ones_like(x)
    torch.testing.assert_close(
        torch.func.vmap(torch.func.grad(lambda z: 3 * stabilise(z).sum()))(x), expected
    )
    _, forward = torch.func.jvp(stabilise, (x,), (expected,))
    torch.testing.assert_close(forward, expected)


@every
def test_a_batch_inside_a_graph_is_differentiable(stabilise):
    x = numbers(4, 5).requires_grad_()
    torch.func.vmap(stabilise)(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.ones_like(x))


@every
def test_what_it_is_given_stays(stabilise):
    for x in (numbers(5), numbers(5).requires_grad_()):
        before = x.detach().clone()
        stabilise(x)
        assert torch.equal(x.detach(), before)


FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", FLOATS)
def test_rounding_adds_nothing(dtype):
    x = torch.tensor([-3.0, 1e-3, torch.finfo(dtype).tiny, torch.inf], dtype=dtype)
    assert torch.equal(rounding(x), x)


@pytest.mark.parametrize("dtype", FLOATS)
def test_what_is_zero_has_no_share_under_rounding(dtype):
    x = torch.tensor([0.0, -0.0], dtype=dtype)
    assert torch.equal(1 / rounding(x), torch.zeros(2, dtype=dtype))


@pytest.mark.parametrize("dtype", FLOATS[:3])
def test_nor_has_what_would_make_infinity_of_a_number(dtype):
    x = torch.tensor([torch.finfo(dtype).smallest_normal / 64], dtype=dtype)
    assert torch.equal(1 / rounding(x), torch.zeros(1, dtype=dtype))


def test_quotients_of_float16_are_numbers():
    x = torch.tensor([1.0, -1.0, 1.0], dtype=torch.float16)
    small = torch.tensor([1e-6, 1e-6, 0.5], dtype=torch.float16)
    assert quotient(x, small).tolist() == [8192.0, -8192.0, 2.0]
    assert quotient(x.float(), small.float())[0] > 1e5


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 10**400])
def test_numbers_are_finite(value):
    with pytest.raises(ValueError, match="gamma is a finite number, got"):
        number(value, "gamma")
    with pytest.raises(ValueError, match="stabilizer is a finite number, got"):
        checked(value)


@pytest.mark.parametrize("value", ["1", None, True, [1.0], torch.tensor(1.0)])
def test_numbers_are_numbers(value):
    with pytest.raises(TypeError, match="gamma is a number, got"):
        number(value, "gamma")


def test_numbers_of_numpy_become_plain_ones():
    found = checked(numpy.float32(0.25))
    assert type(found) is float and found == 0.25


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_what_is_not_stabilised_has_no_share_where_the_denominator_is_zero(dtype):
    over, under = (
        torch.tensor([[6.0, 0.0, 2.0], [6.0, 1.0, 2.0]], dtype=dtype),
        torch.tensor([3.0, 0.0, -0.0]),
    )
    under = under.to(dtype)
    wanted = torch.tensor([2.0, 0.0, 0.0], dtype=dtype).expand(2, 3)
    assert torch.equal(plain_quotient(over, under), wanted)
    assert torch.equal(plain_quotient(over[:, :1], under[:1]), wanted[:, :1])
    assert torch.equal(torch.func.vmap(plain_quotient, in_dims=(0, None))(over, under), wanted)


@pytest.mark.parametrize("epsilon", [1e-6, 0.25, 0.0, rounding, lambda z: z + 0.1])
def test_what_is_left_is_the_value_over_itself_stabilised(epsilon):
    z = torch.tensor([-2.0, -1e-7, -0.0, 0.0, 1e-7, 0.3, 5.0], dtype=torch.float64)
    assert torch.equal(left_of(z, epsilon), z / stabilize(z, epsilon))
    assert left_of(z, epsilon)[z == 0].eq(0).all()
