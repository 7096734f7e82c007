"""Where an axis was before values were moved."""

from __future__ import annotations

import pytest
import torch

from tdhook.tape.axes import before_moves

MOVES = {
    "flatten": (lambda y: y.flatten(0, 1), 1, 2),
    "unflatten": (lambda y: y.view(2, 3, 2, 2), 1, 1),
    "transpose": (lambda y: y.transpose(1, 2), 1, 2),
    "transpose, from behind": (lambda y: y.transpose(-1, -2), 2, 1),
    "permute": (lambda y: y.permute(2, 0, 1), 0, 2),
    "permute, from behind": (lambda y: y.permute(-1, 0, 1), 2, 1),
    "copy": (lambda y: y.clone(), 1, 1),
    "an axis of one more": (lambda y: y.unsqueeze(1), 2, 1),
    "an axis of one more, from behind": (lambda y: y[..., None], 2, 2),
    "an axis of one more, behind": (lambda y: y.unsqueeze(-2), 1, 1),
}


@pytest.mark.parametrize("move, axis, expected", MOVES.values(), ids=MOVES)
def test_the_axis_before(move, axis, expected):
    y = 2 * torch.randn(2, 3, 4, requires_grad=True)
    z = move(y)
    node, found, shape = before_moves(z.grad_fn, axis, z.shape)
    assert node is y.grad_fn and found == expected and tuple(shape) == tuple(y.shape)


@pytest.mark.parametrize(
    "move", [lambda y: y.squeeze(), lambda y: y.squeeze(1), lambda y: y.squeeze((1, -1))]
)
def test_without_axes_of_one(move):
    y = 2 * torch.randn(2, 1, 4, 1, requires_grad=True)
    z = move(y)
    node, found, shape = before_moves(z.grad_fn, 1, z.shape)
    assert node is y.grad_fn and found == 2 and tuple(shape) == (2, 1, 4, 1)


def test_a_matrix_that_is_transposed():
    y = 2 * torch.randn(2, 3, requires_grad=True)
    assert before_moves(y.t().grad_fn, 1, (3, 2)) == (y.grad_fn, 0, [2, 3])


def test_several_moves_are_followed_one_by_one():
    y = 2 * torch.randn(2, 3, 4, requires_grad=True)
    z = y.transpose(1, 2).reshape(8, 3)
    moved, steps = (z.grad_fn, 1, z.shape), 0
    while (further := before_moves(*moved)) is not None:
        moved, steps = further, steps + 1
    assert steps == 3 and moved[0] is y.grad_fn and moved[1] == 1 and tuple(moved[2]) == (2, 3, 4)


@pytest.mark.parametrize(
    "move, axis",
    [
        (lambda y: y.view(2, 12), 1),  # of two axes one
        (lambda y: y.view(2, 3, 2, 2), 2),  # a part of an axis
        (lambda y: y.view(4, 6), 1),  # neither
        (lambda y: y.unsqueeze(1), 1),  # that is new
        (lambda y: y.exp(), 1),
        (lambda y: y.sum(0), 1),
    ],
)
def test_no_axis_before(move, axis):
    y = 2 * torch.randn(2, 3, 4, requires_grad=True)
    z = move(y)
    assert before_moves(z.grad_fn, axis, z.shape) is None
    x = torch.randn(2, 3, requires_grad=True)
    assert before_moves(x.view(6).grad_fn.next_functions[0][0], 0, x.shape) is None, (
        "a leaf was made by nothing"
    )
