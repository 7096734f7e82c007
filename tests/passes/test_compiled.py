"""One graph: `torch.compile(explained, fullgraph=True)` equals eager for every rule, preset, shape and target.

`torch.compile` can drop a custom backward pass without a word, and would then give the plain gradient.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from compiled_models import FEATURES, RULES, Residual, assert_equal, compiled, dense, image, observation, some
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from tdhook import LRP, Contrast, Key, Target, preset
from tdhook.relevance.composites.composite import PRESETS

pytestmark = [
    # Dynamo makes an instance of a function to trace it.
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    # tensordict asks for a setting that torch has done away with.
    pytest.mark.filterwarnings("ignore:torch._dynamo.config.inline_inbuilt_nn_modules is deprecated"),
]


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


@pytest.mark.parametrize("name", some(RULES, {"epsilon", "z-plus", "softmax", "layer norm"}))
def test_every_rule(name):
    composite, make = RULES[name]
    net = make()
    shape = (4, FEATURES) if name in ("recurrent", "attention") else (FEATURES,)
    target = Target("output", "argmax")
    td = observation(5, shape=shape)
    eager = LRP(composite, target=target).wrap(net)(td.clone())
    if name != "norm":
        plain = LRP(target=target, warn_on_missing_rule=False).wrap(net)(td.clone())
        assert not torch.allclose(plain["attr", "input"], eager["attr", "input"])
    assert_equal(compiled(LRP(composite, target=target).wrap(net))(td.clone()), eager)


@pytest.mark.parametrize("make", [dense, image, Residual])
@pytest.mark.parametrize("name", some(PRESETS, {"epsilon_plus"}))
def test_every_preset(name, make):
    arguments = {"low": -4.0, "high": 4.0} if name == "epsilon_gamma_box" else {}
    net = make().double()
    shape = (2, 8, 8) if make is image else (FEATURES,)
    baseline = 0.0 if name.startswith("deeplift_") else None
    method = LRP(preset(name, **arguments), target=Target("output", "argmax"), baseline=baseline)
    explained, graph = method.wrap(net), compiled(method.wrap(net))
    for batch in (4, 7):  # one size, then any
        td = observation(batch, shape=shape)
        assert_equal(graph(td.clone()), explained(td.clone()))


@pytest.mark.parametrize("dynamic", [None, True])
def test_new_batch_sizes_take_no_new_graph(dynamic):
    net = dense()
    explained = LRP("epsilon_plus", target=Target("output", "argmax")).wrap(net)
    counter = CompileCounterWithBackend("aot_eager")
    graph = compiled(explained, counter, dynamic=dynamic)
    for batch in (4, 7, 30):
        td = observation(batch)
        assert_equal(graph(td.clone()), explained(td.clone()))
    assert counter.frame_count == (2 if dynamic is None else 1)


@pytest.mark.parametrize("make", [dense, pytest.param(image, marks=pytest.mark.slow)])
def test_any_batch_shape(make):
    explained = LRP("epsilon_plus", target=Target("output", "argmax")).wrap(make())
    graph = compiled(explained)
    for batch in ((), (4,), (2, 3)):
        td = observation(*batch, shape=(2, 8, 8) if make is image else (FEATURES,))
        eager = explained(td.clone())
        assert_equal(graph(td.clone()), eager)


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.pixels, self.vector, self.out = nn.Linear(4, 3), nn.Linear(2, 3), nn.Linear(6, 2)

    def forward(self, pixels, vector):
        return self.out(torch.cat([self.pixels(pixels), self.vector(vector)], -1).relu())


def test_several_nested_keys():
    model = TensorDictModule(Mixed(), [("obs", "pixels"), ("obs", "deep", "vector")], [("heads", "q")])
    explained = LRP("epsilon_plus", target=Target(("heads", "q"), 1)).wrap(model)
    td = TensorDict(obs={"pixels": torch.randn(4, 4), "deep": {"vector": torch.randn(4, 2)}}, batch_size=[4])
    result = compiled(explained)(td.clone())
    assert result["attr", "obs", "deep", "vector"].shape == (4, 2)
    assert_equal(result, explained(td.clone()))


TARGETS = {
    "whole": "output",
    "integer": Target("output", 1),
    "entry": Target("output", Key("index")),
    "one-hot entry": Target("output", Key("hot")),
    "tensor": Target("output", torch.tensor([0, 2, 1, 1])),
    "all": Target("output", "all"),
    "list": Target("output", [0, "argmax"]),
    "contrast": Contrast(Target("output", "argmax"), Target("output", "all")),
    "function": lambda outputs, inputs: TensorDict(
        output=outputs["output"] * inputs["scale"], batch_size=[4]
    ),
}


@pytest.mark.parametrize("name", some(TARGETS, {"entry", "all"}))
def test_every_kind_of_target(name):
    index = torch.arange(4) % 3
    td = observation(4, index=index, hot=F.one_hot(index, 3), scale=torch.rand(4, 3).double())
    explained = LRP("epsilon_plus", target=TARGETS[name]).wrap(dense())
    assert_equal(compiled(explained)(td.clone()), explained(td.clone()))


def test_several_targets_of_any_batch_size_take_one_graph():
    explained = LRP("epsilon_plus", target=Target("output", "all")).wrap(dense())
    counter = CompileCounterWithBackend("aot_eager")
    graph = compiled(explained, counter)
    for batch in (4, 7, 30):
        td = observation(batch)
        assert_equal(graph(td.clone()), explained(td.clone()))
    assert counter.frame_count == 2


def test_keys_and_modules_inside():
    model = TensorDictSequential(
        TensorDictModule(nn.Linear(FEATURES, 5).double(), ["input"], [("hidden", "state")]),
        TensorDictModule(nn.Linear(5, 3).double(), [("hidden", "state")], ["q"]),
    )
    explained = LRP(
        "epsilon_plus", target=Target("q", "argmax"), attribute="all", input_modules=["module.0.module"]
    ).wrap(model)
    td = observation(4)
    result = compiled(explained)(td.clone())
    assert_equal(result, explained(td.clone()))
    assert result["attr", "hidden", "state"].shape == (4, 5)
