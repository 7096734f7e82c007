"""Torch functions of what is no tensor are explained as what they compute with tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tensordict import TensorDict, tensorclass
from torch import Tensor, nn

from tdhook import LRP, Target
from tdhook.attribution import GradientTimesInput
from tdhook.selectors import Op
from tdhook.targets import Through

from .checks import assert_same, every_flow, relevance_of

CONSTANT = torch.arange(18.0, dtype=torch.float64).cos().reshape(3, 6)


@tensorclass
class Held:
    h: Tensor


def of(h: Tensor) -> TensorDict:
    return TensorDict({"h": h}, h.shape[:1])


# A function of TensorDicts, and the same of their entries.
WAYS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "mean": (lambda h, c: torch.mean(of(h), 0)["h"], lambda h, c: h.mean(0)),
    "sum": (lambda h, c: torch.sum(of(h), 0)["h"], lambda h, c: h.sum(0)),
    "var": (lambda h, c: torch.var(of(h), 0)["h"], lambda h, c: h.var(0)),
    "std": (lambda h, c: torch.std(of(h), 0)["h"], lambda h, c: h.std(0)),
    "maximum": (lambda h, c: torch.maximum(of(h), of(c))["h"], torch.maximum),
    "mse_loss": (
        lambda h, c: F.mse_loss(of(h), of(c), reduction="none")["h"],
        lambda h, c: F.mse_loss(h, c, reduction="none"),
    ),
    "smooth_l1_loss": (
        lambda h, c: F.smooth_l1_loss(of(h), of(c), reduction="none")["h"],
        lambda h, c: F.smooth_l1_loss(h, c, reduction="none"),
    ),
    "stack": (lambda h, c: torch.stack([of(h), of(c)])["h"].sum(0), lambda h, c: torch.stack([h, c]).sum(0)),
    "cat": (lambda h, c: torch.cat([of(c), of(h)])["h"] * 2, lambda h, c: torch.cat([c, h]) * 2),
    "where": (
        lambda h, c: torch.where(torch.tensor([True, False, True]), of(h), of(c))["h"],
        lambda h, c: torch.where(torch.tensor([[True], [False], [True]]), h, c),
    ),
    "stacked tensorclasses": (
        lambda h, c: torch.stack([Held(h, batch_size=[3]), Held(c, batch_size=[3])]).h.sum(0),
        lambda h, c: torch.stack([h, c]).sum(0),
    ),
}


@every_flow
@pytest.mark.parametrize("name", WAYS)
def test_functions_of_tensordicts(name: str, flow: str) -> None:
    found, wanted = (relevance_of(lambda h, way=way: way(h, CONSTANT), flow) for way in WAYS[name])
    assert_same(found, wanted, 1e-9)


class Net(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.function = nn.Linear(4, 6), nn.Linear(6, 2), function
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.first(x)))


def explained(method: Any, function: Callable[[Tensor], Tensor]) -> TensorDict:
    x = torch.arange(12.0, dtype=torch.float64).sin().reshape(3, 4)
    return method.wrap(Net(function))(TensorDict({"input": x}, [3]))


@pytest.mark.parametrize("name", [name for name in WAYS if name not in ("mean", "sum", "var", "std", "cat")])
@pytest.mark.parametrize("baseline", [None, 0.0])
def test_their_ledger_closes(name: str, baseline: float | None) -> None:
    lrp = LRP("epsilon_plus", target=Target("output", 0), baseline=baseline, ledger=True)
    found, wanted = (explained(lrp, lambda h, way=way: way(h, CONSTANT)) for way in WAYS[name])
    assert found["ledger", "gap"].abs().max() < 1e-12
    torch.testing.assert_close(found["attr", "input"], wanted["attr", "input"])
    torch.testing.assert_close(found["ledger", "absorbed"], wanted["ledger", "absorbed"])


class Odd:
    """Knows one torch function, which it takes for another."""

    def __init__(self, value: Tensor) -> None:
        self.value = value

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0].exp() * args[1].value if func is torch.add else NotImplemented


def test_of_any_class_that_computes_them_itself() -> None:
    lrp = LRP("epsilon", target=Target("output", 0), ledger=True)
    found = explained(lrp, lambda h: torch.add(h, Odd(CONSTANT)))
    wanted = explained(lrp, lambda h: h.exp() * CONSTANT)
    assert found["ledger", "gap"].abs().max() < 1e-12
    torch.testing.assert_close(found["attr", "input"], wanted["attr", "input"])
    with pytest.raises(TypeError, match="Odd"):
        explained(lrp, lambda h: torch.sub(h, Odd(CONSTANT)))


@pytest.mark.parametrize("method", [GradientTimesInput(), LRP("epsilon")], ids=["gradient", "LRP"])
def test_their_operations_are_selected(method: Any) -> None:
    within = method.explaining(Through(Target("output", 0), Op("smooth_l1_loss"), 2, axis=-1))
    found = explained(within, lambda h: WAYS["smooth_l1_loss"][0](h, CONSTANT))
    wanted = explained(within, lambda h: WAYS["smooth_l1_loss"][1](h, CONSTANT))
    assert wanted["attr", "input"].abs().max() > 0
    torch.testing.assert_close(found["attr", "input"], wanted["attr", "input"])
