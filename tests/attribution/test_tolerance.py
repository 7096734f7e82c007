"""Integrated gradients until a tolerance: written out by hand, and no further than it takes."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from tdhook import Target
from tdhook.attribution import IntegratedGradients


def relus() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3)).double()


class Cubic(nn.Module):
    """``x0^3 + 2 x0 x1 + x2``, which Simpson's rule integrates exactly and the trapezoid rule does not."""

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = x.unbind(-1)
        return (a**3 + 2 * a * b + c).unsqueeze(-1)


def trapezoid(net: nn.Module, x: Tensor, index: int, stretches: int) -> Tensor:
    found = torch.zeros_like(x)
    for i in range(stretches + 1):
        at = (i / stretches * x).requires_grad_()
        (grad,) = torch.autograd.grad(net(at)[index], at)
        found += x * grad / stretches * (0.5 if i in (0, stretches) else 1)
    return found


def by_hand(net: nn.Module, x: Tensor, index: int, tolerance: float) -> tuple[Tensor, int]:
    """One element, and how many steps it takes."""
    rise, stretches = (net(x) - net(0 * x))[index].detach(), 4
    while True:
        coarse, fine = (trapezoid(net, x, index, count) for count in (stretches, 2 * stretches))
        stretches *= 2
        found = min((fine, (4 * fine - coarse) / 3), key=lambda sums: abs(float(rise - sums.sum())))
        if abs(rise - found.sum()) <= tolerance:
            return found, stretches + 1


@pytest.mark.parametrize("tolerance", [1e-2, 1e-3, 3e-4])
def test_each_element_goes_as_far_as_it_takes(tolerance: float) -> None:
    net, x = relus(), torch.randn(12, 6, generator=torch.Generator().manual_seed(1)).double()
    method = IntegratedGradients(Target("output", 1), tolerance=tolerance, steps=4097, ledger=True)
    found = method.wrap(net)(TensorDict({"input": x}, [12]))
    expected = [by_hand(net, row, 1, tolerance) for row in x]
    torch.testing.assert_close(
        found["attr", "input"], torch.stack([one for one, _ in expected]), rtol=1e-9, atol=1e-12
    )
    assert found["ledger", "gap"].abs().max() <= tolerance
    if tolerance < 1e-2:  # some are refined when others are done
        assert len({steps for _, steps in expected}) > 1


def test_several_outputs_are_all_that_close() -> None:
    net, x = relus(), torch.randn(4, 2, 6, generator=torch.Generator().manual_seed(1)).double()
    method = IntegratedGradients(Target("output", "all"), tolerance=1e-2, ledger=True)
    found = method.wrap(net)(TensorDict({"input": x}, [4, 2]))
    assert found["ledger", "gap"].shape == (4, 2, 3) and found["ledger", "gap"].abs().max() <= 1e-2


@pytest.mark.filterwarnings("error")
def test_where_the_model_is_smooth_few_steps_do() -> None:
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(1)).double()
    found = IntegratedGradients(tolerance=1e-10, steps=9).wrap(Cubic())(TensorDict({"input": x}, [5]))
    a, b, c = x.unbind(-1)
    torch.testing.assert_close(
        found["attr", "input"], torch.stack([a**3 + a * b, a * b, c], -1), rtol=1e-10, atol=1e-12
    )


def test_what_is_not_that_close_in_time_is_said() -> None:
    td = TensorDict({"input": torch.randn(7, 6, generator=torch.Generator().manual_seed(1)).double()}, [7])
    with pytest.warns(
        UserWarning,
        match=r"integrated gradients of \d of 7 elements of the batch are .* off after 17 steps, which is",
    ):
        IntegratedGradients(Target("output", 0), tolerance=1e-9, steps=17).wrap(relus())(td)


@pytest.mark.parametrize(
    "options, told",
    [
        ({"tolerance": 0.0}, "a tolerance is how far a sum may be off, a positive number, got 0.0"),
        (
            {"tolerance": 1e-3, "steps": 8},
            "a tolerance takes at least 9 steps to be seen, got steps=8 at most",
        ),
        (
            {"tolerance": 1e-3, "compile": True},
            "how many steps a tolerance takes is seen as it goes, which no graph",
        ),
    ],
)
def test_mistakes(options, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        IntegratedGradients(**options)
