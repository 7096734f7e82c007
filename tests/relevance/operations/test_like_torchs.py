"""Operations of others that are called like one of torch's, and compute something else."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from tdhook import LRP, Target
from tdhook.rules import PassRule
from tdhook.selectors import Op
from tdhook.targets import as_one

pytestmark = pytest.mark.usefixtures("doubles")

Function = Callable[[Tensor], Tensor]


def cubic(x: Tensor) -> Tensor:
    return x**3 + x


def slope(ctx, grad: Tensor) -> Tensor:
    (x,) = ctx.saved_tensors
    return grad * (3 * x**2 + 1)


@cache
def operator(name: str) -> Function:
    def compute(x: Tensor) -> Tensor:
        return cubic(x)

    made = torch.library.custom_op(f"theirs::{name}", compute, mutates_args=())
    made.register_autograd(slope, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))
    return made


def packet(name: str) -> Function:
    operator(name)
    return getattr(torch.ops.theirs, name)


def function(name: str) -> Function:
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return cubic(x)

    methods = {"forward": staticmethod(forward), "backward": staticmethod(slope)}
    return type(name, (torch.autograd.Function,), methods).apply


def one(name: str) -> Function:
    def compute(x: Tensor) -> Tensor:
        return cubic(x)

    compute.__name__ = name
    return as_one(compute)


class Net(nn.Module):
    def __init__(self, between: Function) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.between = nn.Linear(4, 5), nn.Linear(5, 2), between

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self.first(x)))


def relevance(between: Function, composite: object, baseline: float | None = None) -> Tensor:
    lrp = LRP(composite, target=Target("output", 1), baseline=baseline, on_unmatched="raise")
    torch.manual_seed(1)
    return lrp.wrap(Net(between))(TensorDict({"input": torch.randn(3, 4)}, [3]))["attr", "input"]


KINDS = (operator, packet, function, one)
each_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


@each_kind
@pytest.mark.parametrize("preset", ["epsilon_plus", "attn_lrp", "deeplift", "deeplift_shapley"])
@pytest.mark.parametrize("name", ["relu", "softmax", "linear", "clone", "layer_norm", "max_pool1d"])
def test_they_are_what_they_are_under_a_name_of_their_own(
    name: str, preset: str, kind: Callable[[str], Function]
) -> None:
    baseline = 0.3 if preset.startswith("deeplift") else None
    found = relevance(kind(name), preset, baseline)
    torch.testing.assert_close(found, relevance(kind("cubic"), preset, baseline), rtol=1e-12, atol=1e-12)


@each_kind
def test_a_composite_names_them_with_whose_they_are(kind: Callable[[str], Function]) -> None:
    made = kind("relu")
    owner = "theirs" if kind in (operator, packet) else __name__.rpartition(".")[2]
    (name,) = Op(made).operations
    assert name == f"{owner}::relu"
    passed = relevance(made, [(Op(name), PassRule())])
    (other,) = Op(kind("cubic")).operations
    assert other == "cubic"
    torch.testing.assert_close(passed, relevance(kind("cubic"), [(Op(other), PassRule())]))
    assert not torch.allclose(passed, relevance(made, "epsilon"))


def test_an_operator_of_torch_without_its_overload_is_what_it_is_by_its_function() -> None:
    aten = torch.ops.aten
    pairs: list[tuple[Function, Function]] = [
        (aten.relu, torch.relu),
        (lambda x: aten.add(self=x, other=x.detach(), alpha=2), lambda x: torch.add(x, x.detach(), alpha=2)),
        (lambda x: aten.mul(x, 2.0), lambda x: x * 2.0),
        (lambda x: aten.relu_(x * 1.0), lambda x: torch.relu(x * 1.0)),
        (lambda x: aten.max(x, 1, True)[0] * x, lambda x: x.max(1, True)[0] * x),
    ]
    for by_operator, by_function in pairs:
        for preset, baseline in (("epsilon", None), ("attn_lrp", None), ("deeplift", 0.3)):
            found = relevance(by_operator, preset, baseline)
            torch.testing.assert_close(found, relevance(by_function, preset, baseline))
