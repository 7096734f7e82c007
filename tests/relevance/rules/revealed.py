"""RevealCancel and Shapley by their definitions, and the calls that explain by their rules."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import Tensor, nn

from tdhook import LRP, Target

FLOWS = ("relevance", "gradient")


FUNCTIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "silu": nn.SiLU,
    "leaky": lambda: nn.LeakyReLU(0.2),
}


def slope(function: Callable[[Tensor], Tensor], begin: Tensor, end: Tensor) -> Tensor:
    """That of a secant, and where its ends meet the derivative."""
    at = begin.clone().requires_grad_()
    with torch.enable_grad():
        (derivative,) = torch.autograd.grad(function(at).sum(), at)
    step = end - begin
    return torch.where(step == 0, derivative, (function(end) - function(begin)) / step)


def reveal_cancel(contributions: Tensor, start: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """What each contribution counts per unit of the function behind them.

    Args:
        contributions: ``[outputs, positions]``.
        start: the output of the layer on the reference, ``[outputs]``.
        function: what is behind.
    """
    gained, lost = contributions.clamp(min=0).sum(1), contributions.clamp(max=0).sum(1)
    end = start + gained + lost
    first, last = (start, start + gained), (start + lost, end)
    of_gained = (slope(function, *first) + slope(function, *last)) / 2
    of_lost = (slope(function, start, start + lost) + slope(function, start + gained, end)) / 2
    middle = ((of_gained + of_lost) / 2).unsqueeze(1)
    found = torch.where(contributions > 0, of_gained.unsqueeze(1), of_lost.unsqueeze(1))
    return torch.where(contributions == 0, middle, found)


def shapley(contributions: Tensor, start: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Likewise, by sums of some of them that are normal."""
    rise, size, variance = contributions.sum(1), contributions.abs().sum(1), contributions.square().sum(1)
    mean = torch.zeros_like(rise)
    for share in ((3 - 3**0.5) / 6, (3 + 3**0.5) / 6):
        deviation = (share * (1 - share) * variance).sqrt()
        for node, weight in ((3**0.5, 1 / 6), (0.0, 2 / 3), (-(3**0.5), 1 / 6)):
            # The mean of a derivative, by parts.
            mean += weight * node * function(start + share * rise + node * deviation) / deviation / 2
    derivative = slope(function, start, start)
    mean = torch.where(variance == 0, derivative, mean)
    left = function(start + rise) - function(start) - mean * rise
    half = torch.where(variance == 0, 0.0, left / size)
    return mean.unsqueeze(1) + half.unsqueeze(1) * contributions.sign()


Definition = Callable[[Tensor, Tensor, Callable[[Tensor], Tensor]], Tensor]


DEFINITIONS: dict[str, Definition] = {"deeplift_reveal_cancel": reveal_cancel, "deeplift_shapley": shapley}


each_preset = pytest.mark.parametrize("preset_", DEFINITIONS)


def explained(
    model: nn.Module,
    x: Tensor,
    start: object,
    composite: object = "deeplift_reveal_cancel",
    **options: object,
) -> TensorDict:
    options.setdefault("target", Target("output", 0))
    with LRP(composite, baseline=start, on_unmatched="raise", **options).prepare(model) as run:
        return run(TensorDict({"input": x}, x.shape[:1]))


def relevance(*args: object, **options: object) -> Tensor:
    return explained(*args, **options)["attr", "input"]


def networks(function: str) -> nn.Sequential:
    make = FUNCTIONS[function]
    return nn.Sequential(
        nn.Linear(5, 8), make(), nn.Linear(8, 6, bias=False), make(), nn.Linear(6, 4), nn.Linear(4, 3)
    )


class Odd(nn.Module):
    """Outputs that go to several places, moved on their way, and layers that are called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.slopes = nn.PReLU(6)

    def forward(self, x: Tensor) -> Tensor:
        z = self.first(x)
        h = torch.relu(z) + z.tanh() + 0.5 * z
        h = F.silu(self.second(h), inplace=True) + self.slopes(self.second(h)).view(-1, 2, 3).flatten(1)
        h = torch.sigmoid(self.second(h).view(-1, 3, 2)).flatten(1) * h
        return F.linear(torch.exp(F.linear(h, self.second.weight)), self.last.weight, self.last.bias)


def normed() -> nn.Module:
    model = nn.Sequential(
        *(nn.Unflatten(-1, (1, 5)), nn.Conv1d(1, 4, 3, padding=1), nn.BatchNorm1d(4), nn.ReLU(inplace=True)),
        *(nn.Conv1d(4, 3, 3, stride=2), nn.BatchNorm1d(3), nn.Dropout(), nn.PReLU(3), nn.Flatten()),
        *(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.GELU(), nn.Linear(6, 3), nn.LogSoftmax(-1)),
    )
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm1d):
            for values in (norm.weight.data, norm.bias.data, norm.running_mean):
                values.normal_()
            norm.running_var.uniform_(0.5, 2.0)
    return model.eval()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "network": lambda: networks("relu"),
    "odd": Odd,
    "normed": normed,
    "drawn": lambda: nn.Sequential(nn.Linear(5, 8), nn.RReLU(), nn.Linear(8, 3)),
}
