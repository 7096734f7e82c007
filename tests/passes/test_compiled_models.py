"""One graph of models as they are: modes, training, what they overwrite, agents, larger graphs."""

from __future__ import annotations

import pytest
import torch
from compiled_models import FEATURES, Recurrent, Residual, assert_equal, compiled, dense, image, observation
from tensordict.nn import TensorDictModule
from torch import nn

from tdhook import LRP, Target

pytestmark = [
    # Dynamo makes an instance of a function to trace it.
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    # tensordict asks for a setting that torch has done away with.
    pytest.mark.filterwarnings("ignore:torch._dynamo.config.inline_inbuilt_nn_modules is deprecated"),
]


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


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
