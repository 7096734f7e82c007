"""Values that are written to one place: the last of them is there, and has all of its relevance."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from tdhook import LRP, Target
from tdhook.rules import IgnoreRule

pytestmark = pytest.mark.usefixtures("doubles")

TWICE = torch.tensor([0, 0, 2])


class Net(nn.Module):
    """Three values, and three that are written to places among them."""

    def __init__(self, writes: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.writes = nn.Linear(5, 6), nn.Linear(3, 2), writes

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.last(self.writes(h[:, :3] * 1, h[:, 3:]))


def _item(a: Tensor, b: Tensor) -> Tensor:
    a[:, TWICE] = b
    return a


def _items(a: Tensor, b: Tensor) -> Tensor:
    a[torch.arange(len(a)), [0] * len(a)] = 2 * b[:, 0]
    a[:, [0, 0, 2]] = b
    return a


def _rows(x: Tensor) -> Tensor:
    return torch.arange(len(x))[:, None]


def _flat(x: Tensor) -> Tensor:
    return TWICE + 3 * _rows(x)


def _last(a: Tensor, b: Tensor) -> Tensor:
    return torch.stack([b[:, 1], a[:, 1], b[:, 2]], -1)


def _sums(a: Tensor, b: Tensor) -> Tensor:
    return torch.stack([a[:, 0] + b[:, 0] + b[:, 1], a[:, 1], a[:, 2] + b[:, 2]], -1)


def _products(a: Tensor, b: Tensor) -> Tensor:
    return torch.stack([a[:, 0] * b[:, 0], a[:, 1], a[:, 2] * b[:, 1]], -1)


WAYS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "scatter": (lambda a, b: a.scatter(1, TWICE.expand_as(b), b), _last),
    "scatter of more": (
        lambda a, b: a.scatter(1, TWICE[:2].expand(len(b), 2), b),
        lambda a, b: torch.stack([b[:, 1], a[:, 1], a[:, 2]], -1),
    ),
    "scatter in place": (lambda a, b: a.scatter_(dim=1, index=TWICE.expand_as(b), src=b), _last),
    "index_put": (lambda a, b: a.index_put((_rows(a), TWICE), b), _last),
    "index_put of one": (
        lambda a, b: a.index_put((_rows(a), TWICE), b[:, :1]),
        lambda a, b: torch.stack([b[:, 0], a[:, 1], b[:, 0]], -1),
    ),
    "index_copy": (lambda a, b: a.index_copy(1, TWICE, b), _last),
    "put": (lambda a, b: a.put(_flat(a), b), _last),
    "items": (_item, _last),
    "items by lists": (_items, _last),
    "scatter_add of more": (
        lambda a, b: a.scatter_add(1, TWICE[:2].expand(len(b), 2), b),
        lambda a, b: torch.stack([a[:, 0] + b[:, 0] + b[:, 1], a[:, 1], a[:, 2]], -1),
    ),
    "scatter_reduce of more": (
        lambda a, b: a.scatter_reduce_(1, TWICE[1:].expand(len(b), 2), b, "prod"),
        _products,
    ),
    "scatter that adds": (lambda a, b: a.scatter(1, TWICE.expand_as(b), b, reduce="add"), _sums),
    "scatter that multiplies": (
        lambda a, b: a.scatter_(1, TWICE[1:].expand(len(b), 2), b, reduce="multiply"),
        _products,
    ),
}


def explain(model: nn.Module, **arguments: object) -> TensorDict:
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The reduce argument of torch.scatter")
        return LRP("epsilon", target=Target("output", 0), **arguments).wrap(model)(
            TensorDict({"input": x}, [4])
        )


@pytest.mark.parametrize("baseline", [None, 0.3])
@pytest.mark.parametrize("flow", ["relevance", "gradient"])
@pytest.mark.parametrize("name", WAYS)
def test_what_is_written_last_has_all(name: str, flow: str, baseline: float | None) -> None:
    way, plain = WAYS[name]
    found, wanted = (
        explain(Net(writes), flow=flow, baseline=baseline, ledger=True) for writes in (way, plain)
    )
    torch.testing.assert_close(found["output"], wanted["output"])
    torch.testing.assert_close(found["attr", "input"], wanted["attr", "input"])
    assert found["ledger", "gap"].abs().max() < 1e-9


@pytest.mark.parametrize("name", ["scatter", "index_put", "index_copy", "items"])
def test_a_graph_does_the_same(name: str) -> None:
    way, plain = WAYS[name]
    found = explain(Net(way), compile={"backend": "aot_eager"})
    torch.testing.assert_close(found["attr", "input"], explain(Net(plain))["attr", "input"])


def test_what_is_written_once_is_moved() -> None:
    model = Net(lambda a, b: a.index_copy(1, torch.tensor([0, 2]), b[:, :2]))
    plan = LRP("epsilon", target=Target("output", 0)).plan(
        model, TensorDict({"input": torch.ones(2, 5)}, [2])
    )
    assert [row.rule for row in plan if "index_copy" in str(plan.cells(row))] == [IgnoreRule()]
