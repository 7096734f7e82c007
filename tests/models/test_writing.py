"""TensorDictModules write as they do by themselves, within a run of an explanation too."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from tensordict import NonTensorData, TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn

from tdhook import LRP, Target
from tdhook.models.model import Model
from tdhook.models.writing import WritingPlainly

NAME = "_write_to_tensordict"


class Two(nn.Module):
    """Returns what it is told to."""

    def __init__(self, made):
        super().__init__()
        self.made = made

    def forward(self, x):
        return self.made(x)


def run(module):
    return module(TensorDict(x=torch.arange(6.0).reshape(2, 3), batch_size=[2]))


CASES = {
    "a tensor": (lambda x: 2 * x, ["y"], {}),
    "nested": (lambda x: (x, 2 * x), ["y", ("a", "b")], {}),
    "one of two": (lambda x: (x, 2 * x), ["_", "y"], {}),
    "a dictionary": (lambda x: {"y": 2 * x, "z": x}, ["y", "z"], {}),
    "a TensorDict": (lambda x: TensorDict(a=x, batch_size=[2]), ["y"], {}),
    "text": (lambda x: NonTensorData("text"), ["y"], {}),
    "a list of numbers": (lambda x: ([1.0, 2.0],), ["y"], {}),
    "apart": (lambda x: 2 * x, ["y"], {"inplace": False}),
    "empty": (lambda x: 2 * x, ["y"], {"inplace": "empty"}),
    "what was there": (lambda x: x + 1, ["x"], {}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_same_is_written(case):
    made, keys, options = CASES[case]
    module = TensorDictModule(Two(made), ["x"], keys, **options)
    expected = run(module)
    with WritingPlainly(module.modules()):
        found = run(module)
    assert NAME not in module.__dict__
    assert set(found.keys(True, True)) == set(expected.keys(True, True))
    assert found.batch_size == expected.batch_size and bool((found == expected).all())


def test_selected_keys_are_written():
    module = TensorDictModule(Two(lambda x: (x, 2 * x)), ["x"], ["y", "z"])
    module.select_out_keys("z")
    expected = run(module)
    with WritingPlainly(module.modules()):
        found = run(module)
    assert set(found.keys()) == set(expected.keys()) == {"x", "z"}


@pytest.mark.parametrize(
    "made, message", [(lambda x: (x, x), "more tensors"), (lambda x: (), "more out_keys")]
)
def test_errors_are_the_same(made, message):
    module = TensorDictModule(Two(made), ["x"], ["y"])
    with WritingPlainly(module.modules()), pytest.raises(RuntimeError, match=message):
        run(module)
    assert NAME not in module.__dict__


class Own(TensorDictModule):
    """Has a way of its own to write."""

    def _write_to_tensordict(self, tensordict, tensors, tensordict_out=None, out_keys=None):
        return super()._write_to_tensordict(tensordict, [z + 1 for z in tensors], tensordict_out, out_keys)


def test_a_way_of_their_own_is_kept():
    module = Own(nn.Identity(), ["x"], ["y"])
    with WritingPlainly(module.modules()):
        assert NAME not in module.__dict__
        assert torch.equal(run(module)["y"], run(module)["x"] + 1)


def test_a_model_is_as_it_was_after_an_explanation_and_an_error():
    torch.manual_seed(0)
    parts = [TensorDictModule(nn.Linear(3, 3), ["x"], ["h"]), TensorDictModule(nn.Linear(3, 2), ["h"], ["q"])]
    module = TensorDictSequential(*parts)
    explained = LRP("epsilon_plus", target=Target("q", "argmax")).wrap(module)
    run(explained)
    with pytest.raises(RuntimeError):
        explained(TensorDict(x=torch.randn(2, 4), batch_size=[2]))
    assert all(NAME not in part.__dict__ for part in parts)


def test_copies_that_are_made_within_write_too():
    module = TensorDictModule(nn.Linear(3, 3), ["x"], ["y"])
    with WritingPlainly(module.modules()):
        copied = copy.deepcopy(module)
    assert torch.equal(run(copied)["y"], run(module)["y"])
    model = pickle.loads(pickle.dumps(Model.of(module)))
    assert torch.equal(
        model.run(TensorDict(x=torch.ones(2, 3), batch_size=[2]))[0]["y"], module.module(torch.ones(2, 3))
    )
