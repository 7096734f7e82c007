"""Networks on graphs: layers of torch_geometric, unmodified, and messages between nodes as sparse matrices.

Each layer stands between two linear ones. A batch has one element, the graph: its nodes read each other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from tdhook import Target

from .checks import check, check_difference

pytest.importorskip("torch_geometric", reason="torch_geometric is not installed; `nox -s zoo` installs it")

from torch_geometric import nn as layers

pytestmark = [
    pytest.mark.zoo,
    pytest.mark.filterwarnings("ignore:Sparse"),
    pytest.mark.filterwarnings("ignore:An output with one or more elements was resized"),
]

NODES, EDGES, SIZE, WIDE = 7, 16, 4, 6
CHANCE = torch.Generator().manual_seed(0)
LINKS = torch.randint(0, NODES, (2, EDGES), generator=CHANCE)
SORTED = LINKS[:, LINKS[1].argsort(stable=True)]
FEATURES, PLACES = (torch.randn(n, 3, generator=CHANCE, dtype=torch.float64) for n in (EDGES, NODES))
KINDS = torch.arange(EDGES) % 3
GRAPHS = torch.tensor([0, 0, 0, 1, 1, 1, 1])

Call = Callable[[nn.Module, Tensor], Any]


def along(layer: nn.Module, h: Tensor) -> Tensor:
    return layer(h, LINKS)


def with_features(layer: nn.Module, h: Tensor) -> Tensor:
    return layer(h, LINKS, FEATURES)


def of_kinds(layer: nn.Module, h: Tensor) -> Tensor:
    return layer(h, LINKS, KINDS)


def in_space(layer: nn.Module, h: Tensor) -> Tensor:
    return layer(h, PLACES, LINKS)


def in_order(layer: nn.Module, h: Tensor) -> Tensor:
    return layer(h, SORTED)


def of_graphs(layer: nn.Module, h: Tensor) -> Tensor:
    return layer(h, GRAPHS)


def twice(layer: nn.Module, h: Tensor) -> Tensor:
    return layer(h, 2 * h, LINKS)


def sage(aggregation: Any) -> Callable[[], nn.Module]:
    return lambda: layers.SAGEConv(SIZE, WIDE, aggr=aggregation)


def mlp(inputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, WIDE), nn.ReLU())


CASES: dict[str, tuple[Callable[[], nn.Module], Call]] = {
    "GCN": (lambda: layers.GCNConv(SIZE, WIDE), along),
    "Cheb": (lambda: layers.ChebConv(SIZE, WIDE, K=3), along),
    "GraphConv": (lambda: layers.GraphConv(SIZE, WIDE), along),
    "gated": (lambda: layers.GatedGraphConv(WIDE, 2), along),
    "residual, gated": (lambda: layers.ResGatedGraphConv(SIZE, WIDE), along),
    "GAT": (lambda: layers.GATConv(SIZE, WIDE, heads=2), along),
    "GAT of edges": (lambda: layers.GATConv(SIZE, WIDE, edge_dim=3), with_features),
    "GATv2": (lambda: layers.GATv2Conv(SIZE, WIDE, heads=2), along),
    "transformer": (lambda: layers.TransformerConv(SIZE, WIDE, edge_dim=3, beta=True), with_features),
    "ARMA": (lambda: layers.ARMAConv(SIZE, WIDE), along),
    "FeaSt": (lambda: layers.FeaStConv(SIZE, WIDE, heads=2), along),
    "SuperGAT": (lambda: layers.SuperGATConv(SIZE, WIDE, heads=2), along),
    "FiLM": (lambda: layers.FiLMConv(SIZE, WIDE), along),
    "EG": (lambda: layers.EGConv(SIZE, WIDE, num_heads=2, num_bases=2), along),
    "hypergraph": (lambda: layers.HypergraphConv(SIZE, WIDE), along),
    "PDN": (lambda: layers.PDNConv(SIZE, WIDE, 3, 5), with_features),
    "APPNP": (lambda: layers.APPNP(3, 0.1), along),
    "both ways": (lambda: layers.DirGNNConv(layers.SAGEConv(SIZE, WIDE)), along),
    "GIN": (lambda: layers.GINConv(mlp(SIZE), train_eps=True), along),
    "edges": (lambda: layers.EdgeConv(mlp(2 * SIZE)), along),
    "weights of edges": (lambda: layers.NNConv(SIZE, WIDE, nn.Linear(3, SIZE * WIDE)), with_features),
    "crystals": (lambda: layers.CGConv(SIZE, 3, batch_norm=True), with_features),
    "mixture": (lambda: layers.GMMConv(SIZE, WIDE, 3, 2), with_features),
    "points": (lambda: layers.PointNetConv(mlp(SIZE + 3)), in_space),
    "points, transformer": (lambda: layers.PointTransformerConv(SIZE, WIDE), in_space),
    "GCN2": (lambda: layers.GCN2Conv(SIZE, 0.1, 0.5, 1), twice),
    "kinds": (lambda: layers.RGCNConv(SIZE, WIDE, 3, num_bases=2), of_kinds),
    "kinds, attention": (lambda: layers.RGATConv(SIZE, WIDE, 3), of_kinds),
    "sum": (sage("sum"), along),
    "largest": (sage("max"), along),
    "product": (sage("mul"), along),
    "softmax": (sage("softmax"), along),
    "spread": (sage("std"), along),
    "powers": (sage("powermean"), along),
    "LSTM": (sage("lstm"), in_order),
    "several": (sage(["mean", "max", "std"]), along),
    "graph norm": (lambda: layers.GraphNorm(SIZE), of_graphs),
    "instance norm": (lambda: layers.InstanceNorm(SIZE), of_graphs),
    "layer norm": (lambda: layers.LayerNorm(SIZE), of_graphs),
    "pair norm": (layers.PairNorm, of_graphs),
    "set to set": (lambda: layers.aggr.Set2Set(SIZE, 2), of_graphs),
    "set transformer": (lambda: layers.aggr.SetTransformerAggregation(SIZE, heads=2), of_graphs),
    "attention of nodes": (lambda: layers.aggr.AttentionalAggregation(nn.Linear(SIZE, 1)), of_graphs),
}


class Network(nn.Module):
    """``[1, nodes, SIZE] -> [1, values]``."""

    def __init__(self, layer: nn.Module, call: Call) -> None:
        super().__init__()
        self.first, self.layer, self.last = nn.Linear(SIZE, SIZE), layer, nn.LazyLinear(3)
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.call(self.layer, torch.relu(self.first(x[0]))))).reshape(1, -1)


def made(name: str) -> tuple[nn.Module, TensorDict]:
    make, call = CASES[name]
    model, td = (
        Network(make(), call).double().eval(),
        TensorDict(input=torch.randn(1, NODES, SIZE), batch_size=[1]),
    )
    model(td["input"])
    with torch.no_grad():
        for param in model.parameters():
            param += 0.1 * torch.randn_like(param)
    return model, td


@pytest.mark.usefixtures("doubles")
@pytest.mark.parametrize("name", CASES)
def test_all_relevance_is_accounted_for(name: str) -> None:
    model, td = made(name)
    explained = check(model, td, target=Target("output", 1), composite="attn_lrp", exact=False)
    a, b = (explained[flow]["attr", "input"] for flow in ("relevance", "gradient"))
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


@pytest.mark.usefixtures("doubles")
@pytest.mark.parametrize("name", CASES)
def test_all_of_a_difference_arrives(name: str) -> None:
    model, td = made(name)
    check_difference(model, td, target=Target("output", 1), tolerance=1e-8, exact=False)
