"""One graph: `torch.compile(explained, fullgraph=True)` equals eager for every rule, preset, shape and kind of model.

`torch.compile` can drop a custom backward pass without a word, and would then give the plain gradient.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from tdhook import LRP, Contrast, Key, Target, preset
from tdhook.attribution.lrp_helpers import rules as r
from tdhook.models.layers import Sum
from tdhook.relevance.composites.composite import PRESETS

FEATURES = 6

pytestmark = [
    # Dynamo makes an instance of a function to trace it.
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    # tensordict asks for a setting that torch has done away with.
    pytest.mark.filterwarnings("ignore:torch._dynamo.config.inline_inbuilt_nn_modules is deprecated"),
]


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


def compiled(explained, backend="aot_eager", **options):
    return torch.compile(explained, fullgraph=True, backend=backend, **options)


def dense(middle=None):
    return nn.Sequential(nn.Linear(FEATURES, 9), middle or nn.ReLU(), nn.Linear(9, 3)).double()


def image():
    layers = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.AvgPool2d(2), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(4, 3)).double().eval()


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(FEATURES, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        h = F.gelu(self.first(x))
        return self.last(h + self.inner(self.norm(h)))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.into, self.out = nn.Linear(FEATURES, 8), nn.Linear(8, 3)
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        h = self.into(x)
        h = h + self.attend(h, h, h, need_weights=False)[0]
        return self.out(F.silu(h).mean(-2))


class Recurrent(nn.Module):
    def __init__(self, cell):
        super().__init__()
        self.cell, self.out = cell(FEATURES, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x):
        return self.out(self.cell(x)[0][:, -1])


def observation(*batch, shape=(FEATURES,), **entries):
    return TensorDict(input=torch.randn(*batch, *shape).double(), **entries, batch_size=batch)


def assert_equal(ours, theirs):
    assert set(ours.keys(True, True)) == set(theirs.keys(True, True))
    for key in theirs.keys(True, True):
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-12, atol=1e-12)


def some(cases, quick):
    """All cases as parameters; those that are not quick wait for --slow."""
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in cases]


# --- Rules and presets ----------------------------------------------------------------------------


def linear(rule):
    return [(nn.Linear, rule)]


RULES = {
    "epsilon": (linear(r.EpsilonRule(1e-3)), dense),
    "epsilon without bias": (linear(r.EpsilonRule(zero_params="bias")), dense),
    "uniform epsilon": (linear(r.UniformEpsilonRule()), dense),
    "gamma": (linear(r.GammaRule()), dense),
    "alpha-beta": (linear(r.AlphaBetaRule()), dense),
    "z-plus": (linear(r.ZPlusRule()), dense),
    "z-box": (linear(r.ZBoxRule(-4.0, 4.0)), dense),
    "w-square": (linear(r.WSquareRule()), dense),
    "flat": (linear(r.FlatRule()), dense),
    "stop": ([(nn.Tanh, r.StopRule()), (nn.Linear, r.EpsilonRule())], lambda: dense(nn.Tanh())),
    "pass": ([(nn.Tanh, r.PassRule()), (nn.Linear, r.EpsilonRule())], lambda: dense(nn.Tanh())),
    "uniform": ([(nn.Tanh, r.UniformRule()), (nn.Linear, r.EpsilonRule())], lambda: dense(nn.Tanh())),
    "pseudo-identity": ([(nn.GELU, r.PseudoIdentityRule())], lambda: dense(nn.GELU())),
    "layer norm": ([(nn.LayerNorm, r.LayerNormRule())], lambda: dense(nn.LayerNorm(9))),
    "packed projection": ([(nn.Linear, r.AHQKVRule())], lambda: nn.Linear(FEATURES, 9).double()),
    "softmax": (
        [(nn.Softmax, r.SoftmaxEpsilonRule()), (nn.Linear, r.EpsilonRule())],
        lambda: dense(nn.Softmax(-1)),
    ),
    "norm": ([(Sum, r.NormRule())], lambda: nn.Sequential(nn.Unflatten(-1, (3, 2)), Sum(-1))),
    "recurrent": (preset("lstm_lrp"), lambda: Recurrent(nn.GRU).double()),
    "attention": (preset("attn_lrp"), lambda: Attention().double()),
}


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
    method = LRP(preset(name, **arguments), target=Target("output", "argmax"))
    explained, graph = method.wrap(net), compiled(method.wrap(net))
    for batch in (4, 7):  # one size, then any
        td = observation(batch, shape=shape)
        assert_equal(graph(td.clone()), explained(td.clone()))


# --- Shapes ---------------------------------------------------------------------------------------


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


# --- Targets --------------------------------------------------------------------------------------

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


# --- The model and its surroundings ---------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_inside_every_grad_mode(mode):
    explained = LRP("epsilon_plus", target=Target("output", "argmax")).wrap(dense())
    graph = compiled(explained)
    with mode():
        td = observation(4)
        result = graph(td.clone())
        assert_equal(result, explained(td.clone()))
    assert not result["attr", "input"].requires_grad and not result["output"].requires_grad


@pytest.mark.parametrize("change", ["optimiser", "data", "load", "replaced"])
def test_parameters_of_the_moment_count(change):
    net = dense()
    explained = LRP("epsilon_plus", target=Target("output", "argmax")).wrap(net)
    graph, td = compiled(explained), observation(4)
    before = graph(td.clone())
    if change == "optimiser":
        net(td["input"]).sum().backward()
        torch.optim.SGD(net.parameters(), 0.1).step()
    elif change == "data":
        net[0].weight.data.mul_(-2)
    elif change == "load":
        net.load_state_dict(dense().state_dict())
    else:
        net[0].weight = nn.Parameter(torch.randn_like(net[0].weight))
    after = graph(td.clone())
    assert_equal(after, explained(td.clone()))
    assert not torch.allclose(before["attr", "input"], after["attr", "input"])


def test_training_mode():
    """Buffers are updated, what was dropped is what eager drops, and a change of mode takes another graph."""

    def make():
        torch.manual_seed(1)
        return nn.Sequential(
            nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.ReLU(), nn.Linear(8, 3)
        ).double()

    ours, theirs = make(), make()
    method = LRP("epsilon_plus", target=Target("output", "argmax"))
    graph, explained, td = compiled(method.wrap(ours)), method.wrap(theirs), observation(4)
    for training in (True, True, False, True):
        ours.train(training)
        theirs.train(training)
        torch.manual_seed(2)
        expected = explained(td.clone())
        torch.manual_seed(2)
        assert_equal(graph(td.clone()), expected)
        for a, b in zip(ours.buffers(), theirs.buffers(), strict=True):
            torch.testing.assert_close(a, b)


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(FEATURES, 8), nn.Linear(8, 3)

    def forward(self, x):
        h = self.first(x)
        kept = h * 2
        h.relu_()
        h += 1
        h[..., 0] = 0
        h.view(-1, 2, 4)[:, 1].mul_(3)
        return self.last(h + kept.sigmoid_())


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("flow", ["relevance", "gradient"])
def test_a_model_that_overwrites_tensors(flow, warm):
    method = LRP("epsilon_plus", target=Target("output", "argmax"), flow=flow)
    net, td = InPlace().double(), observation(4)
    expected, explained = method.wrap(net)(td.clone()), method.wrap(net)
    if warm:
        explained(td.clone())
    assert_equal(compiled(explained)(td.clone()), expected)


def test_layers_that_overwrite_their_input():
    net = nn.Sequential(nn.Linear(FEATURES, 8), nn.ReLU(inplace=True), nn.Linear(8, 3)).double()
    explained, td = LRP("epsilon_plus", target=Target("output", "argmax")).wrap(net), observation(4)
    assert_equal(compiled(explained)(td.clone()), explained(td.clone()))
    assert net[1].inplace


@pytest.mark.parametrize("cell", [nn.LSTM, pytest.param(nn.GRU, marks=pytest.mark.slow)])
def test_recurrent_models(cell):
    explained = LRP("lstm_lrp", target=Target("output", "argmax")).wrap(Recurrent(cell).double())
    td = observation(4, shape=(3, FEATURES))
    assert_equal(compiled(explained)(td.clone()), explained(td.clone()))


def actor(kind):
    modules = pytest.importorskip("torchrl.modules")
    from torchrl.data import OneHot

    def network(n_out):
        return modules.MLP(in_features=FEATURES, out_features=n_out, num_cells=[8], activation_class=nn.ReLU)

    if kind == "q-value":
        return modules.QValueActor(network(3), in_keys=["input"], spec=OneHot(3)), Target(
            "action_value", "action"
        )
    if kind == "categorical":
        logits = TensorDictModule(network(3), ["input"], ["logits"])
        distribution = modules.OneHotCategorical
        model = modules.ProbabilisticActor(logits, in_keys=["logits"], distribution_class=distribution)
        return model, Target("logits", "action")
    agents = modules.MultiAgentMLP(
        n_agent_inputs=FEATURES,
        n_agent_outputs=3,
        n_agents=2,
        centralized=False,
        share_params=kind == "agents that share",
        depth=1,
        num_cells=4,
    )
    return TensorDictModule(agents, ["input"], ["q"]), Target("q", "argmax")


@pytest.mark.parametrize("kind", ["q-value", "categorical", "agents", "agents that share"])
def test_actors_of_torchrl(kind):
    model, target = actor(kind)
    model = model.double()
    method = LRP("epsilon_plus", target=target)
    td = observation(4, shape=(2, FEATURES) if "agents" in kind else (FEATURES,))
    expected = method.wrap(model)(td.clone())
    graph = compiled(method.wrap(model))
    assert_equal(graph(td.clone()), expected)
    if "agents" in kind:  # their parameters are in a TensorDict
        next(model.parameters()).data.mul_(-2)
        assert_equal(graph(td.clone()), method.wrap(model)(td.clone()))


@pytest.mark.slow
@pytest.mark.parametrize("make", [dense, image, Residual])
def test_with_the_default_backend(make):
    explained = LRP("epsilon_plus", target=Target("output", "argmax")).wrap(make().double())
    td = observation(5, shape=(2, 8, 8) if make is image else (FEATURES,))
    assert_equal(compiled(explained, "inductor")(td.clone()), explained(td.clone()))


def test_as_a_part_of_a_larger_graph():
    explained = LRP("epsilon_plus", target=Target("output", "argmax")).wrap(dense())

    @torch.compile(fullgraph=True, backend="aot_eager")
    def salient(td):
        return explained(td)["attr", "input"].abs().argmax(-1)

    td = observation(4)
    assert torch.equal(salient(td.clone()), explained(td.clone())["attr", "input"].abs().argmax(-1))
