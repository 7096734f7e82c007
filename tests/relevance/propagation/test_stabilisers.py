"""Stabilisers: what is computed from them can be differentiated, as often as wanted."""

import pytest
import torch

from tdhook.relevance.propagation.stabilisers import exact, moved_away, rounding, stabilize

STABILISERS = {
    "stabilize": lambda z: stabilize(z, 1e-3),
    "a callable": lambda z: stabilize(z, lambda x: x + 1e-3 * x.sign()),
    "stabilize by rounding": lambda z: stabilize(z, rounding),
    "stabilize exactly": lambda z: stabilize(z, exact),
    "moved_away": lambda z: moved_away(z, 1e-3),
    "rounding": rounding,
    "exact": exact,
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
