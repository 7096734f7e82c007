"""What a model holds is put back: the same objects, with what was in them."""

from __future__ import annotations

import random
from threading import Thread

import numpy as np
import pytest
import torch
from stateful import KINDS, Net
from torch import nn

from tdhook.models import snapshots
from tdhook.models.snapshots import Snapshot
from tdhook.models.state import restored


class Boom(Exception):
    pass


def seeded() -> None:
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)


def ran(model: nn.Module) -> list[torch.Tensor]:
    return [model(torch.ones(n, 4)) for n in (2, 3)]


def failing(model: nn.Module, kind: type[BaseException]) -> None:
    ran(model)
    raise kind


def ran_alike(model: nn.Module) -> list[torch.Tensor]:
    """From the same random numbers on."""
    seeded()
    return ran(model)


@pytest.mark.parametrize("name", KINDS)
def test_what_any_module_remembers_is_forgotten(name: str) -> None:
    model, fresh = Net(*KINDS[name], None), Net(*KINDS[name], None)
    held, order = dict(vars(model)), list(vars(model))
    with restored(model):
        ran(model)
    assert list(vars(model)) == order
    assert all(vars(model)[attribute] is value for attribute, value in held.items())
    for ours, plain in zip(ran_alike(model), ran_alike(fresh), strict=True):
        assert torch.equal(ours, plain)


@pytest.mark.parametrize("name", KINDS)
def test_it_is_known_whether_a_module_remembers(name: str) -> None:
    model = Net(*KINDS[name], None)
    with restored(model) as held:
        assert held.moved == ()
        model(torch.ones(2, 4))
        moved = held.moved
    owners = {"nothing": [], "what a hook closes over and was given": [model.linear]}
    if name == "a module in a list":
        owners[name] = [model.others[0]]
    assert list(moved) == owners.get(name, [model])
    with restored(model, among=moved):
        again = ran_alike(model)
    for ours, plain in zip(again, ran_alike(model), strict=True):
        assert torch.equal(ours, plain)


def test_only_where_the_block_raised_if_so_asked() -> None:
    model = Net(*KINDS["a list"], None)
    with restored(model, always=False):
        ran(model)
    assert len(model.past) == 2
    past = model.past
    with pytest.raises(Boom), restored(model, always=False):
        failing(model, Boom)
    assert len(model.past) == 2 and model.past is past


@pytest.mark.parametrize("kind", [KeyboardInterrupt, Boom])
def test_it_is_put_back_whatever_was_raised(kind: type[BaseException]) -> None:
    model = Net(*KINDS["an object"], None)
    with pytest.raises(kind), restored(model):
        failing(model, kind)
    assert model.memory.count == 0 and model.memory.past == []


def test_parameters_are_not_copied_but_their_places_are_kept() -> None:
    model = nn.Linear(3, 2)
    weight, values = model.weight, model.weight.detach().clone()
    with restored(model):
        model.weight = nn.Parameter(torch.zeros(2, 3))
        model.register_parameter("other", nn.Parameter(torch.zeros(1)))
    assert model.weight is weight and torch.equal(weight, values) and not hasattr(model, "other")
    with restored(model), torch.no_grad():
        model.weight.zero_()
    assert (model.weight == 0).all()


def test_shared_random_numbers_are_drawn_again() -> None:
    def draw() -> tuple[float, float, float]:
        return torch.rand(1).item(), random.random(), float(np.random.rand())

    with restored(nn.Identity()):
        first = draw()
    assert draw() == first

    def elsewhere() -> None:
        with restored(nn.Identity()):
            draw()

    thread = Thread(target=elsewhere)
    state = torch.get_rng_state()
    thread.start()
    thread.join()
    assert not torch.equal(torch.get_rng_state(), state), "another thread puts back what this one draws"


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_a_lazy_layer_stays_made() -> None:
    model = nn.Sequential(nn.LazyLinear(3), nn.ReLU())
    with restored(model):
        model(torch.ones(2, 4))
    assert type(model[0]) is nn.Linear and model[0].in_features == 4 and model[0].weight.shape == (3, 4)


class Library:
    """Stands for an object of a library: a buffer, say, or a file."""

    __module__ = "torchrl.data"

    def __init__(self) -> None:
        self.count = 0


class Tree:
    def __init__(self, size: int) -> None:
        self.below = [Leaf() for _ in range(size)]


class Leaf:
    value = 0


def test_objects_of_libraries_are_left_alone() -> None:
    model = nn.Identity()
    model.library = Library()
    with restored(model):
        model.library.count += 1
    assert model.library.count == 1


def test_what_is_looked_into_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Identity()
    model.tree = Tree(100)
    with restored(model):
        for leaf in model.tree.below:
            leaf.value = 1
    assert {leaf.value for leaf in model.tree.below} == {0}
    monkeypatch.setattr(snapshots, "_MOST", 50)
    with restored(model):
        for leaf in model.tree.below:
            leaf.value = 1
    assert {leaf.value for leaf in model.tree.below} == {0, 1}


def test_inference_tensors_are_put_back() -> None:
    model = nn.Identity()
    with torch.inference_mode():
        model.register_buffer("h", torch.zeros(2))
    with restored(model), torch.inference_mode():
        model.h += 1
    assert model.h.tolist() == [0.0, 0.0] and model.h.is_inference()


def test_a_snapshot_may_be_put_back_more_than_once() -> None:
    model = Net(*KINDS["a tensor that is overwritten"], None)
    before = Snapshot([model])
    for _ in range(2):
        ran(model)
        assert model.h.any() and before.moved == (model,)
        before.put_back()
        assert not model.h.any()


def test_the_place_that_rules_take_is_left_to_whoever_took_it() -> None:
    """An explanation that is interrupted while it puts back has taken its rules off before it is asked again."""
    model = nn.Linear(3, 2)
    model.forward = lambda x: x
    during = Snapshot([model])
    del model.forward
    during.put_back()
    assert during.moved == () and "forward" not in vars(model)
