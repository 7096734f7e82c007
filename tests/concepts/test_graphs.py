"""Attribution graphs: edges from unit to unit, against matrices, and that nothing of any unit is lost."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from tdhook import LRP, Target
from tdhook.attribution import GradientTimesInput
from tdhook.concepts import Node, attribution_graph
from tdhook.targets import Units


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.enter, self.inside = nn.Linear(4, 6, bias=False), nn.Linear(6, 5, bias=False)
        self.back, self.leave = nn.Linear(5, 6, bias=False), nn.Linear(6, 3, bias=False)

    def forward(self, x):
        h = F.relu(self.enter(x))
        return self.leave(h + self.back(F.relu(self.inside(h))))


class Parallel(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 3), nn.Linear(4, 2), nn.Linear(5, 2)

    def forward(self, x):
        return self.head(torch.cat([self.a(x).tanh(), self.b(x).relu()], -1))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def close(a, b, tolerance=1e-9):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.fixture
def residual():
    model = Residual().double()
    td = TensorDict({"input": torch.randn(3, 4).double()}, [3])
    return model, td


LAYERS = {"enter": None, "inside": None}


def test_edges_against_matrices(residual):
    """Gradient times value: an edge is ``unit * df/dunit`` as far as it comes by that earlier unit."""
    model, td = residual
    graph = attribution_graph(
        GradientTimesInput(Target("output", 1)), model, td, LAYERS, inputs={"input": -1}
    )
    x = td["input"]
    w1, w2, w3, w4 = (m.weight.detach() for m in (model.enter, model.inside, model.back, model.leave))
    a = x @ w1.T
    on = (a > 0).double()
    z = (a * on) @ w2.T
    at_inside = (w4[1] @ w3) * (z > 0)  # the gradient of the output by what `inside` gives
    close(graph.relevance["inside"], z * at_inside)
    close(graph.edges["inside", "enter"], at_inside.unsqueeze(-1) * w2 * (a * on).unsqueeze(1))
    at_enter = (at_inside @ w2 + w4[1]) * on
    close(graph.relevance["enter"], a * at_enter)
    close(graph.edges["enter", "input"], at_enter.unsqueeze(-1) * w1 * x.unsqueeze(1))
    close(graph.direct("enter"), a * on * w4[1])
    assert ("inside", "input") not in graph.edges  # all that passes the one passes the other
    close(graph.absorbed("enter"), torch.zeros(3, 6).double())


def test_what_goes_past_a_layer_is_an_edge_of_its_own(residual):
    model, td = residual
    method = GradientTimesInput(Target("output", 1))
    graph = attribution_graph(method, model, td, {"enter": None, "inside": None, "leave": None})
    close(
        graph.edges["leave", "enter"].sum(1) + graph.edges["inside", "enter"].sum(1), graph.relevance["enter"]
    )
    close(graph.relevance["leave"].sum(-1), model(td["input"])[:, 1].detach())
    for layer in graph.layers[:-1]:
        close(graph.direct(layer), torch.zeros_like(graph.relevance[layer]))
    for layer in graph.layers:
        close(graph.absorbed(layer), torch.zeros_like(graph.relevance[layer]))


@pytest.mark.parametrize(
    "method", [LRP("epsilon_plus", ledger=True), LRP("deeplift", baseline=0.1, ledger=True)]
)
def test_the_ledger_closes_for_every_unit(residual, method):
    model, td = residual
    graph = attribution_graph(method.explaining(Target("output", "argmax")), model, td, LAYERS)
    for layer in LAYERS:
        assert graph.gap[layer].shape == graph.relevance[layer].shape
        close(graph.gap[layer], torch.zeros_like(graph.gap[layer]))
    close(graph.direct("input"), torch.zeros(3, 1).double())


def test_branches_side_by_side_hand_nothing_to_each_other():
    model, td = Parallel().double(), TensorDict({"input": torch.randn(2, 4).double()}, [2])
    graph = attribution_graph(LRP("epsilon", target=Target("output", 0)), model, td, {"a": None, "b": None})
    assert set(graph.edges) == {("a", "input"), ("b", "input")}
    close(graph.relevance["input"], graph.edges["a", "input"].sum(1) + graph.edges["b", "input"].sum(1))


@pytest.mark.parametrize("batch", [(), (2, 3)], ids=str)
def test_channels_of_any_batch(batch):
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.Flatten(), nn.Linear(48, 2)
    ).double()
    policy = TensorDictModule(net, ["pixels"], ["q"])
    td = TensorDict({"pixels": torch.randn(*batch, 2, 8, 8).double()}, batch)
    method = LRP("epsilon_plus", target=Target("q", "argmax"))
    layers = {"module.1": 1, "module.2": Units(axis=1)}
    graph = attribution_graph(method, policy, td, layers, inputs={"pixels": 1})
    assert graph.edges["module.2", "module.1"].shape == (*batch, 3, 4)
    assert graph.edges["module.1", "pixels"].shape == (*batch, 4, 2)
    whole = method.wrap(policy)(td.clone())["attr", "pixels"]
    close(graph.relevance["pixels"], whole.sum((-1, -2)))
    close(graph.edges["module.1", "pixels"].sum(-2), whole.sum((-1, -2)))


def test_the_fewest_units_that_have_a_share_are_kept(residual):
    model, td = residual
    graph = attribution_graph(
        GradientTimesInput(Target("output", 1)), model, td, LAYERS, inputs={"input": -1}
    )
    one = graph[1].pruned(0.75)
    for layer, amounts in one.relevance.items():
        kept = one.kept[layer]
        shares = amounts.abs() / amounts.abs().sum()
        assert shares[kept].sum() >= 0.75
        assert shares[kept].sum() - shares[kept].min() < 0.75
        assert (shares[kept].min() >= shares[~kept]).all()
    assert set(one.nodes()) == {
        Node(layer, unit) for layer, marks in one.kept.items() for unit in marks.nonzero().flatten().tolist()
    }
    for above, below in one.links():
        assert above in one.nodes()
        assert below in one.nodes()
    everything = graph[1].pruned(1.0)
    nonzero = sum(int((x[1] != 0).sum()) for x in graph.edges.values())
    assert len(everything.links()) == nonzero


class Remembers(nn.Module):
    """``[*batch, time, features]``: each step is made of those before it, too."""

    def __init__(self):
        super().__init__()
        self.enter, self.inside, self.leave = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(3, 2)

    def forward(self, x):
        return self.leave(self.inside(self.enter(x).tanh().cumsum(-2)).tanh())


@pytest.mark.parametrize("batch", [(4,), (2, 4)], ids=str)
def test_of_elements_that_meet_each_has_its_share_of_what_is_absorbed(batch):
    model, td = Remembers().double(), TensorDict({"input": torch.randn(*batch, 4).double()}, batch)
    graph = attribution_graph(LRP("epsilon", target=Target("output", 1)), model, td, LAYERS)
    for layer in LAYERS:
        edges = [x for (later, _), x in graph.edges.items() if later == layer]
        handed_on = sum(x.sum(-1) for x in edges).sum(-2)
        close(graph.absorbed(layer).sum(-2), graph.relevance[layer].sum(-2) - handed_on)
        close(graph.absorbed(layer), graph.absorbed(layer).mean(-2, keepdim=True).expand(*batch, -1))
        one = (0,) * len(batch)
        close(graph[one].absorbed(layer), graph.absorbed(layer)[one])
        close(graph.direct("enter"), torch.zeros_like(graph.relevance["enter"]), 1e-6)
    alone = attribution_graph(LRP("epsilon", target=Target("output", 1)), Residual().double(), td, LAYERS)
    assert not alone.kept_back


def test_as_data(residual):
    model, td = residual
    graph = attribution_graph(GradientTimesInput(Target("output", 1)), model, td, LAYERS)
    data = graph.to_tensordict()
    assert data.batch_size == (3,)
    assert torch.equal(data["nodes", "enter"], graph.relevance["enter"])
    assert torch.equal(data["edges", "inside", "enter"], graph.edges["inside", "enter"])
    drawn = graph.mean().to_networkx()
    close(
        torch.tensor(drawn.nodes["enter", 0]["relevance"]).double(),
        graph.relevance["enter"][:, 0].mean(),
        1e-6,
    )
    for below, above, amounts in drawn.edges(data=True):
        expected = graph.edges[above[0], below[0]].mean(0)[above[1], below[1]]
        close(torch.tensor(amounts["relevance"]).double(), expected, 1e-6)


def test_misuse_is_told(residual):
    model, td = residual
    method = GradientTimesInput(Target("output", 1))
    with pytest.raises(ValueError, match="at least one layer"):
        attribution_graph(method, model, td, {})
    with pytest.raises(ValueError, match="no module 'nine'"):
        attribution_graph(method, model, td, {"nine": None})
    with pytest.raises(ValueError, match="explains several: name one"):
        attribution_graph(GradientTimesInput(Target("output", "all")), model, td, LAYERS)
    with pytest.raises(ValueError, match="inputs name 'obs', which is not attributed; there are input"):
        attribution_graph(method, model, td, LAYERS, inputs={"obs": None})
    graph = attribution_graph(method, model, td, LAYERS)
    with pytest.raises(ValueError, match=r"of a batch \[3\]: choose an element, graph\[0\]"):
        graph.nodes()
    with pytest.raises(ValueError, match="share=0"):
        graph.pruned(0)


def test_layers_in_another_order_are_told(residual):
    """Its edges would be other ones: those of what goes past a layer that is named too late."""
    model, td = residual
    method = GradientTimesInput(target=Target("output", 1))
    with pytest.raises(ValueError, match=r"'enter', which comes before 'inside', is named after it"):
        attribution_graph(method, model, td, {"inside": None, "enter": None})


class Again(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.leave = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.leave(self.cell(self.cell(x).tanh()).tanh())


def test_the_calls_of_a_module_are_layers_of_their_own():
    model, x = Again().double(), torch.randn(2, 4).double()
    method = GradientTimesInput(target=Target("output", 1))
    graph = attribution_graph(method, model, TensorDict({"input": x}, [2]), {"cell:0": None, "cell:1": None})
    first = model.cell(x)
    second = model.cell(first.tanh()).detach()
    back = (1 - second.tanh() ** 2) * model.leave.weight[1]
    through = (
        back.unsqueeze(2) * model.cell.weight * (1 - first.tanh() ** 2).unsqueeze(1) * first.unsqueeze(1)
    )
    close(graph.edges["cell:1", "cell:0"], through.detach())
    close(graph.relevance["cell:1"], (second * back).detach())
