"""What computes the same is explained alike, however it is written."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdhook.rules import SoftmaxEpsilonRule
from tdhook.selectors import Type

from .checks import TINY, around, assert_balanced, assert_same, every_flow, explained, relevance_of

Function = Callable[[Tensor], Tensor]


def _mean_square(h: Tensor) -> Tensor:
    return h.square().mean(-1, keepdim=True) + 1e-5


def _squares(h: Tensor) -> Tensor:
    return h[:, :4].view(-1, 2, 2) + 6 * torch.eye(2, dtype=h.dtype)


def _maps(h: Tensor) -> Tensor:
    return h.reshape(len(h), 3, 2, 1)


# The first way is the reference.
WAYS: dict[str, dict[str, Function]] = {
    "root mean square": {
        "rsqrt": lambda h: h * torch.rsqrt(_mean_square(h)),
        "power": lambda h: h * _mean_square(h) ** -0.5,
        "method": lambda h: h * _mean_square(h).pow(-0.5),
        "in place": lambda h: h * _mean_square(h).pow_(-0.5),
        "float_power": lambda h: h * torch.float_power(_mean_square(h), exponent=-0.5),
        "overload": lambda h: h * torch.ops.aten.pow.Tensor_Scalar(_mean_square(h), -0.5),
        "reciprocal": lambda h: h * _mean_square(h).sqrt() ** -1,
        "constant over": lambda h: h * torch.div(torch.ones(1, dtype=h.dtype), _mean_square(h).sqrt()),
        "quotient": lambda h: h / _mean_square(h).sqrt(),
        "rms_norm": lambda h: F.rms_norm(h, h.shape[-1:], eps=1e-5),
    },
    "decay": {
        "exp": lambda h: h * torch.exp(-h.roll(1, -1).abs()),
        "exp2": lambda h: h * torch.exp2(-h.roll(1, -1).abs() / math.log(2)),
    },
    "softmax over channels": {
        "function": lambda h: F.softmax(_maps(h), 1),
        "by numpy's name": lambda h: torch.softmax(_maps(h), axis=1),
        "without an axis": lambda h: F.softmax(_maps(h), _stacklevel=0),
        "module": lambda h: nn.Softmax(1)(_maps(h)),
        "module without an axis": lambda h: nn.Softmax()(_maps(h)),
        "module of maps": lambda h: nn.Softmax2d()(_maps(h)),
        "softmin": lambda h: F.softmin(-_maps(h), 1),
        "module of softmin": lambda h: nn.Softmin(1)(-_maps(h)),
        "transposed": lambda h: _maps(h).transpose(1, 3).softmax(-1).transpose(1, 3),
    },
    "log-softmax over channels": {
        "function": lambda h: F.log_softmax(_maps(h), 1),
        "by numpy's name": lambda h: _maps(h).log_softmax(axis=1),
        "without an axis": lambda h: F.log_softmax(_maps(h), _stacklevel=0),
    },
    "logarithm of a sum": {
        "method": lambda h: _maps(h).logsumexp(1, keepdim=True),
        "by numpy's names": lambda h: torch.logsumexp(_maps(h), axis=1, keepdims=True),
    },
    "variance": {
        "method": lambda h: h.var(-1, keepdim=True),
        "by numpy's names": lambda h: torch.var(h, axis=-1, keepdims=True),
    },
    "length": {
        "vector_norm": lambda h: h / torch.linalg.vector_norm(h, dim=-1, keepdim=True),
        "norm": lambda h: h / h.norm(dim=-1, keepdim=True),
        "norm of matrices": lambda h: h / torch.norm(_maps(h).squeeze(-1), "fro", (1, 2)).unsqueeze(-1),
        "linalg": lambda h: h / torch.linalg.norm(h, dim=-1, keepdim=True),
        "normalised": lambda h: F.normalize(h, dim=-1),
    },
    "rows of a table": {
        "index": lambda h: h[torch.tensor([0, 0, 2])],
        "embedding": lambda h: F.embedding(torch.tensor([0, 0, 2]), h),
        "embedding with padding": lambda h: F.embedding(torch.tensor([0, 0, 2]), h, padding_idx=2),
        "by frequency": lambda h: F.embedding(torch.tensor([0, 0, 2]), h, scale_grad_by_freq=True),
    },
    "norm": {
        "root of squares": lambda h: h.square().sum(-1, keepdim=True).sqrt(),
        "by numpy's names": lambda h: torch.linalg.vector_norm(h, axis=-1, keepdims=True),
        "method": lambda h: h.norm(dim=-1, keepdim=True),
        "function": lambda h: torch.norm(h, 2, -1, True),
        "Frobenius": lambda h: torch.norm(h, dim=(-1,), keepdim=True),
        "linalg": lambda h: torch.linalg.norm(h, dim=-1, keepdim=True),
        "vector_norm": lambda h: torch.linalg.vector_norm(h, dim=-1, keepdim=True),
        "distance": lambda h: F.pairwise_distance(h, torch.zeros_like(h), eps=0.0, keepdim=True),
    },
    "norm of all": {
        "root of squares": lambda h: h * h.square().sum().sqrt(),
        "method": lambda h: h * h.norm(),
        "distance": lambda h: h * torch.dist(h, torch.zeros_like(h)),
    },
    "norm of another order": {
        "root of powers": lambda h: (h.abs() ** 3).sum(-1, keepdim=True) ** (1 / 3),
        "method": lambda h: h.norm(3, -1, True),
        "linalg": lambda h: torch.linalg.norm(h, 3, -1, keepdim=True),
    },
    "largest size": {
        "maximum": lambda h: h.abs().amax(-1, keepdim=True),
        "method": lambda h: h.norm(math.inf, -1, True),
    },
    "hypotenuse": {
        "root of squares": lambda h: (h.square() + h.roll(1, -1).square()).sqrt(),
        "hypot": lambda h: torch.hypot(h, h.roll(1, -1)),
    },
    "normalised": {
        "quotient": lambda h: h / h.square().sum(-1, keepdim=True).sqrt(),
        "normalize": lambda h: F.normalize(h, dim=-1),
    },
    "powers": {
        "stacked": lambda h: torch.stack([torch.ones_like(h), h, h**2, h**3], -1),
        "rows": lambda h: torch.stack([torch.vander(row, 4, increasing=True) for row in h]),
        "decreasing": lambda h: torch.stack([torch.vander(row, 4) for row in h]).flip(-1),
        "linalg": lambda h: torch.linalg.vander(h, N=4),
    },
    "likelihood of a normal distribution": {
        "formula": lambda h: 0.5 * (h.square().log() + (h - h.roll(1, -1)).square() / h.square()),
        "loss": lambda h: F.gaussian_nll_loss(h, h.roll(1, -1), h.square(), reduction="none"),
    },
    "quotient": {
        "operator": lambda h: h / (1 + h.roll(1, -1).square()),
        "by name": lambda h: torch.div(input=h, other=1 + h.roll(1, -1).square()),
        "the other way round": lambda h: torch.div(other=1 + h.roll(1, -1).square(), input=h),
        "method": lambda h: h.true_divide(other=1 + h.roll(1, -1).square()),
    },
    "solution": {
        "by place": lambda h: torch.linalg.solve(_squares(h), h[:, 4:, None]),
        "the other way round": lambda h: torch.linalg.solve(B=h[:, 4:, None], A=_squares(h)),
    },
    "power of another": {
        "operator": lambda h: (1 + h.square()) ** h.roll(1, -1),
        "by name": lambda h: torch.pow(exponent=h.roll(1, -1), input=1 + h.square()),
        "method": lambda h: (1 + h.square()).pow(exponent=h.roll(1, -1)),
        "float_power": lambda h: torch.float_power(1 + h.square(), exponent=h.roll(1, -1)),
    },
    "power of a number": {
        "operator": lambda h: 2.0**h,
        "by name": lambda h: torch.pow(self=2.0, exponent=h),
    },
    "product of matrices": {
        "operator": lambda h: h.view(-1, 2, 3) @ h.view(-1, 3, 2),
        "by name": lambda h: torch.bmm(input=h.view(-1, 2, 3), mat2=h.view(-1, 3, 2)),
        "the other way round": lambda h: torch.matmul(other=h.view(-1, 3, 2), input=h.view(-1, 2, 3)),
    },
    "matrix product": {
        "operator": lambda h: h @ torch.ones(6, 2, dtype=h.dtype),
        "linalg": lambda h: torch.linalg.matmul(h, torch.ones(6, 2, dtype=h.dtype)),
    },
}


@every_flow
@pytest.mark.filterwarnings("ignore:Implicit dimension choice")
@pytest.mark.parametrize("what", WAYS)
def test_ways_of_writing(what: str, flow: str) -> None:
    first, *others = WAYS[what]
    wanted = relevance_of(WAYS[what][first], flow)
    for way in others:
        assert_same(relevance_of(WAYS[what][way], flow), wanted, 1e-9)


@pytest.mark.filterwarnings("ignore:Implicit dimension choice")
@pytest.mark.parametrize("what", [what for what in WAYS if what not in ("root mean square", "decay")])
@every_flow
def test_ways_of_writing_against_a_baseline(what: str, flow: str) -> None:
    start = torch.linspace(-0.5, 0.5, 6, dtype=torch.float64)
    found = []
    for way in WAYS[what].values():
        model, x = around(way)
        td, module = explained(model, x, flow, "deeplift", baseline=start)
        assert_balanced(td, module)
        found.append(td["attr", "input"])
        with torch.no_grad():
            rise = (model(x) - model(start.expand_as(x)))[:, 0]
        assert_same(found[-1].sum(), rise.sum(), 1e-9)
        assert_same(found[-1], found[0], 1e-9)


@every_flow
@pytest.mark.filterwarnings("ignore:Implicit dimension choice")
@pytest.mark.parametrize("softmax", [nn.Softmax2d(), nn.Softmax()], ids=["maps", "without an axis"])
def test_softmax_goes_along_the_axis_that_torch_takes(softmax: nn.Module, flow: str) -> None:
    composite = [(Type(nn.Softmax, nn.Softmax2d), SoftmaxEpsilonRule()), *TINY]
    found = []
    for module in (nn.Softmax(1), softmax):
        model, x = around(lambda h, module=module: module(_maps(h)))
        model.softmax = module
        found.append(explained(model, x, flow, composite)[0]["attr", "input"])
    assert_same(*found, 1e-9)


def test_softmax_of_another_axis_is_told() -> None:
    class Along(nn.Module):
        def __init__(self, axis: int) -> None:
            super().__init__()
            self.axis = axis

        def forward(self, x: Tensor) -> Tensor:
            return x.softmax(self.axis)

    def model_of(axis: int) -> tuple[nn.Module, Tensor]:
        along = Along(axis)
        model, x = around(lambda h: along(h.reshape(len(h), 3, 2)))
        model.along = along
        return model, x

    composite = [(Along, SoftmaxEpsilonRule()), *TINY]
    explained(*model_of(-1), "relevance", composite)
    with pytest.raises(ValueError, match="Along returns does not sum to one"):
        explained(*model_of(1), "relevance", composite)
