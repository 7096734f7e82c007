"""Pairs: an encoder that is run on two TensorDicts inside another one."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from tdhook import LRP
from tdhook.attribution import Pair
from tdhook.targets import Computed


def encoder() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))


def two(*batch: int) -> TensorDict:
    torch.manual_seed(1)
    return TensorDict({name: {"x": torch.randn(*batch, 3)} for name in ("left", "right")}, list(batch))


def pair(net: nn.Module) -> Pair:
    return Pair(TensorDictModule(net, ["x"], ["z"]), ("left", "right"))


def test_both_are_encoded() -> None:
    net, td = encoder(), two(4, 2)
    model = pair(net)
    assert model.in_keys == [("left", "x"), ("right", "x")]
    assert model.out_keys == [("left", "z"), ("right", "z")]
    found = model(td)
    assert found is td
    for name in ("left", "right"):
        assert torch.equal(found[name, "z"], net(found[name, "x"]))


def test_parameters_and_modules_are_those_of_the_encoder() -> None:
    net = encoder()
    model = pair(net)
    assert list(model.state_dict()) == [f"module.{name}" for name in net.state_dict()]
    assert list(map(id, model.parameters())) == list(map(id, net.parameters()))
    model.eval()
    assert not net.training and not net[0].training
    model.train()
    assert net.training and model.training
    model.double()
    assert net[0].weight.dtype is torch.float64


def test_a_plain_encoder() -> None:
    net = encoder()
    model = Pair(net, in_keys=["x"], out_keys=["z"])
    td = TensorDict({"a": {"x": torch.randn(4, 3)}, "b": {"x": torch.randn(4, 3)}}, [4])
    assert torch.equal(model(td)["b", "z"], net(td["b", "x"]))
    assert list(model.state_dict()) == list(net.state_dict())


def test_it_is_explained() -> None:
    net, td = encoder(), two(4)
    target = Computed(lambda outputs, inputs: (outputs["left", "z"] - outputs["right", "z"]).square().sum(-1))
    explained = LRP("epsilon", target=target, ledger=True, input_modules=["0"]).wrap(pair(net))
    found = explained(td.clone())
    assert found["ledger", "gap"].abs().max() < 1e-5
    assert found["attr", "left", "x"].shape == found["attr", "right", "x"].shape == (4, 3)
    assert found["attr", "0"].shape == found["attr", "0:1"].shape == (4, 5)


def test_copies() -> None:
    net, td = encoder(), two(4)
    expected = pair(net)(td.clone())["left", "z"]
    for other in (copy.deepcopy(pair(net)), pickle.loads(pickle.dumps(pair(net)))):
        assert torch.equal(other(td.clone())["left", "z"], expected)


def test_errors() -> None:
    net = encoder()
    with pytest.raises(
        KeyError, match=r"a pair is of two TensorDicts, under \('left', 'right'\): 'left' is none"
    ):
        pair(net)(TensorDict({"x": torch.randn(4, 3)}, [4]))
    with pytest.raises(ValueError, match=r"a pair has two names, got \('a', 'a'\)"):
        Pair(net, ("a", "a"))
    with pytest.raises(TypeError, match=r"Pair is called with a TensorDict that has .*, got Tensor"):
        pair(net)(torch.randn(4, 3))
    model = pair(net)
    with pytest.raises(KeyError, match="left"):
        LRP("epsilon").wrap(model)(TensorDict({"x": torch.randn(4, 3)}, [4]))


def test_a_module_that_was_put_in_the_place_of_another() -> None:
    net = encoder()
    model = Pair(net)
    net[2] = nn.Linear(5, 3)
    with pytest.raises(
        RuntimeError, match="modules of Sequential were put in the place of others after Pair was"
    ):
        model(TensorDict({}, [4]))
