"""The tensors in what a module takes and returns, however they are packed; and units that pack them so."""

from __future__ import annotations

from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from tdhook import LRP, Target
from tdhook.rules import EpsilonRule
from tdhook.tape.trees import tree_flatten, tree_leaves, tree_map_tensors, tree_unflatten


@dataclass
class Data:
    a: Any
    b: Any


@dataclass(frozen=True, slots=True)
class Frozen:
    a: Any
    b: Any


Named = namedtuple("Named", "a b")


class Keyed(OrderedDict):
    """Holds its values as attributes, too."""

    def __init__(self, **entries: Any) -> None:
        super().__init__(entries)
        self.__dict__.update(entries)


class Listed(list):
    pass


class Coupled(tuple):
    pass


class Box:
    def __init__(self, a: Any, b: Any) -> None:
        self.a, self.b = a, b


class Slots:
    __slots__ = ("a", "b")

    def __init__(self, a: Any, b: Any) -> None:
        self.a, self.b = a, b


def attributes(packed: Any) -> tuple[Tensor, Tensor]:
    return packed.a, packed.b


def entries(packed: Any) -> tuple[Tensor, Tensor]:
    return packed["a"], packed["b"]


KINDS = {
    "dataclass": (Data, attributes),
    "frozen dataclass": (Frozen, attributes),
    "nested": (lambda a, b: Data(Box([a], 1), {"b": Frozen(b, "text")}), lambda p: (p.a.a[0], p.b["b"].a)),
    "named tuple": (Named, attributes),
    "dictionary by attribute": (lambda a, b: Keyed(a=a, b=b), attributes),
    "dictionary by key": (lambda a, b: Keyed(a=a, b=b), entries),
    "user dictionary": (lambda a, b: UserDict(a=a, b=b), entries),
    "list": (lambda a, b: Listed([a, b]), lambda p: (p[0], p[1])),
    "tuple": (lambda a, b: Coupled((a, b)), lambda p: (p[0], p[1])),
    "object": (Box, attributes),
    "slots": (Slots, attributes),
    "tensordict": (lambda a, b: TensorDict(a=a, b=b, batch_size=a.shape[:1]), entries),
    "distribution": (
        lambda a, b: torch.distributions.Normal(a, b, validate_args=False),
        lambda p: (p.loc, p.scale),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_packed_and_unpacked(kind: str) -> None:
    pack, unpack = KINDS[kind]
    a, b = torch.ones(2), torch.full((2,), 2.0)
    packed = pack(a, b)
    leaves, shape = tree_flatten(packed)
    assert len([x for x in leaves if isinstance(x, Tensor)]) == 2
    other = tree_unflatten([x + 1 if isinstance(x, Tensor) else x for x in leaves], shape)
    assert type(other) is type(packed)
    assert [x.tolist() for x in unpack(other)] == [[2, 2], [3, 3]]
    assert [x.tolist() for x in unpack(packed)] == [[1, 1], [2, 2]]  # the packed ones are as they were


def test_what_is_no_container_is_a_leaf() -> None:
    class Cache:
        def __init__(self) -> None:
            self.keys = [torch.ones(1)]

        def update(self, x: Tensor) -> None:
            self.keys.append(x)

    cache, layer, empty = Cache(), nn.Linear(1, 1), Box(1, None)
    assert tree_leaves((cache, layer, empty, slice(1))) == [cache, layer, empty, slice(1)]


def test_containers_of_containers_of_themselves() -> None:
    box = Box(torch.ones(1), None)
    box.b = box
    assert [type(x) for x in tree_leaves(box)] == [Tensor, Box]


def test_what_does_not_change_is_the_same_object() -> None:
    x, box = torch.ones(1), Box(torch.zeros(1), 2)
    made = tree_map_tensors(lambda t: t + 1 if t is x else t, (x, box))
    assert made[0].item() == 2 and made[1] is box


class Inner(nn.Module):
    def __init__(self, pack: Any, unpack: Any, *, takes: bool) -> None:
        super().__init__()
        self.layer, self.pack, self.unpack, self.takes = nn.Linear(4, 4), pack, unpack, takes

    def forward(self, given: Any) -> Any:
        x, y = self.unpack(given) if self.takes else (given, given)
        return self.pack(self.layer(x) + y, x * y)


class Model(nn.Module):
    def __init__(self, pack: Any, unpack: Any, *, takes: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.head = Inner(pack, unpack, takes=takes), nn.Linear(4, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        given = self.inner.pack(x, x.tanh()) if self.inner.takes else x
        a, b = self.inner.unpack(self.inner(given))
        return self.head(a.relu() + b)


@pytest.mark.parametrize("flow", ["relevance", "gradient"])
@pytest.mark.parametrize("takes", [False, True], ids=["returns", "takes"])
@pytest.mark.parametrize(
    "rule", [EpsilonRule(), EpsilonRule(zero_params="bias")], ids=["shortcut", "formula"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_units_pack_as_they_please(kind: str, rule: EpsilonRule, takes: bool, flow: str) -> None:
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    rules, found = [(Inner, rule), (nn.Linear, EpsilonRule())], []
    for pack, unpack in (KINDS[kind], (lambda a, b: (a, b), lambda p: p)):
        model = Model(pack, unpack, takes=takes).double()
        td = TensorDict({"input": x}, batch_size=[3])
        td = LRP(rules, target=Target("output", 0), flow=flow).wrap(model)(td)
        assert torch.equal(td["output"], model(x))
        found.append(td["attr", "input"])
    assert torch.allclose(*found, rtol=1e-10)
