"""What modules a model holds."""

from __future__ import annotations

from functools import partial

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from tdhook import LRP, Target
from tdhook.models.holding import Beside, Makeup, held_by, modules_of


class Holds(nn.Module):
    def __init__(self, **held: object) -> None:
        super().__init__()
        for name, value in held.items():
            self.__dict__[name] = value


def test_modules_are_named_by_where_they_are() -> None:
    a, b, c, d = (nn.Linear(1, 1) for _ in range(4))
    model = Holds(layers=[a, {"deep": b}], call=partial(lambda layer, x: layer(x), c), scale=2.0)
    model.d = d
    assert modules_of(model) == {
        "": model,
        "d": d,
        "layers.0": a,
        "layers.1.deep": b,
        "call.0": c,
    }


class Kept(tuple):
    """Values that are no container to whoever asks, as representations of e3nn are."""

    def __len__(self):
        raise NotImplementedError

    __iter__ = __contains__ = __len__


def test_a_container_holds_what_it_holds_whatever_its_class_says() -> None:
    layer = nn.Linear(4, 2)
    model = Holds(kept=Kept((1, layer)))
    assert modules_of(model) == {"": model, "kept.1": layer}

    class Net(nn.Linear):
        kept = Kept((1, 2))

    with LRP("epsilon", target=Target("output", 0)).prepare(Net(4, 2)) as explained:
        assert explained(TensorDict({"input": torch.ones(3, 4)}, [3]))["attr", "input"].any()


def test_functions_are_looked_into() -> None:
    inner = nn.Linear(1, 1)
    identity = nn.Identity()

    def call(x: object, *, head: nn.Module = identity) -> object:
        return head(inner(x))

    found = modules_of(TensorDictModule(call, ["x"], ["y"]))
    assert [path for path, module in found.items() if module is inner] == ["module.inner"]
    assert found["module.head"] is identity


def test_what_goes_round_ends() -> None:
    held: list[object] = [nn.Linear(1, 1)]
    held.append(held)
    model = Holds(held=held)

    def call() -> object:
        return call

    model.__dict__["call"] = call
    assert list(modules_of(model)) == ["", "held.0"]


def test_a_makeup_holds_until_something_changes() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.Sequential(nn.ReLU()))
    makeup = Makeup(model)
    assert makeup.holds()
    model[0].weight = nn.Parameter(model[0].weight + 1)
    model.train(False)
    assert makeup.holds()
    model[1][0] = nn.Tanh()
    assert not makeup.holds()
    assert Makeup(model).holds()


def test_modules_beside_those_of_a_model() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    one, other = nn.Linear(3, 4), nn.Linear(4, 3)
    model.add_module("more", Beside({"0.features": one, "0.back": other}))
    found = modules_of(nn.ModuleDict({"inside": model}))
    assert {name: found[f"inside.{name}"] for name in ("0", "0.features", "0.back")} == {
        "0": model[0],
        "0.features": one,
        "0.back": other,
    }
    assert not any(isinstance(module, Beside) for module in found.values())
    assert "more.0.features.weight" in model.state_dict()
    model.load_state_dict(model.state_dict())


def test_a_compiled_module_has_the_mode_of_its_own() -> None:
    linear = nn.Linear(2, 2)
    compiled = torch.compile(linear, backend="eager")
    before = held_by([compiled])
    assert held_by([compiled]) == before
    linear.eval()
    assert held_by([compiled]) != before
    td = TensorDict({"input": torch.ones(3, 2)}, [3])
    lrp = LRP("epsilon", target=Target("output", 0), baseline=0.0)
    found, expected = (lrp.wrap(nn.Sequential(one))(td.copy()) for one in (compiled, linear))
    torch.testing.assert_close(found["attr", "input"], expected["attr", "input"])
