"""Sparse tensors: constants are matrices like any other; where they depend on what is explained, that is told."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import Tensor, nn

from tdhook import LRP, Target
from tdhook.attribution import Gradient, IntegratedGradients, Occlusion
from tdhook.tape.sparse import SPARSE, Live, at_fault, equal

pytestmark = [
    pytest.mark.usefixtures("doubles"),
    pytest.mark.filterwarnings("ignore:Sparse"),  # CSR is in beta state
]

SIZE = 6
PLACES = torch.tensor([[0, 0, 1, 3, 4, 5, 5], [1, 4, 2, 3, 0, 5, 2]])
VALUES = torch.tensor([0.5, -1.2, 2.0, 0.7, -0.4, 1.1, 0.9], dtype=torch.float64)
DENSE = torch.zeros(SIZE, SIZE, dtype=torch.float64).index_put((PLACES[0], PLACES[1]), VALUES)
LAYOUTS = {
    "coo": DENSE.to_sparse,
    "csr": DENSE.to_sparse_csr,
    "csc": DENSE.to_sparse_csc,
}
WAYS = {"lrp": {}, "z-plus": {"rules": "epsilon_plus"}, "reference": {"rules": "deeplift", "baseline": 0.3}}


class Graph(nn.Module):
    """A network on a graph: nodes read what the matrix of their neighbours hands on."""

    def __init__(self, step: Callable[[Tensor, Tensor], Tensor], neighbours: Tensor) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.step = nn.Linear(3, 4), nn.Linear(4, 2), step
        self.register_buffer("neighbours", neighbours)

    def forward(self, x: Tensor) -> Tensor:
        rows = [self.step(self.neighbours, torch.relu(self.first(row))) for row in x]
        return self.last(torch.tanh(torch.stack(rows))).flatten(1)


def states(count: int = 2) -> TensorDict:
    return TensorDict(input=torch.randn(count, SIZE, 3), batch_size=[count])


def explained(model: nn.Module, td: TensorDict, rules: str = "attn_lrp", **options) -> TensorDict:
    method = LRP(rules, target=Target("output", "argmax"), ledger=True, **options)
    module = method.wrap(model)
    for _ in range(2):  # as the plan is made, and by it
        found = module(td.clone())
    assert float(found["ledger", "gap"].abs().max()) < 1e-12
    return found


CONSTANT = {
    "@": lambda a, h: a @ h,
    "@ from the right": lambda a, h: (h.t() @ a).t(),
    "torch.sparse.mm": torch.sparse.mm,
    "mv": lambda a, h: torch.mv(a, h[:, 0])[:, None] * h,
    "addmm": lambda a, h: torch.addmm(h, a, h),
    "addmm_": lambda a, h: h.clone().addmm_(a, h),
    "computed in each call": lambda a, h: (a * 2).t() @ h,
}


@pytest.mark.parametrize("flow", ["relevance", "gradient"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("step", CONSTANT)
def test_a_constant_is_a_matrix(step: str, way: str, flow: str) -> None:
    td = states()
    sparse, dense = DENSE.to_sparse(), DENSE
    given = CONSTANT[step]
    plain = (lambda a, h: a @ h) if step == "torch.sparse.mm" else given
    found = explained(Graph(given, sparse), td, flow=flow, **WAYS[way])
    expected = explained(Graph(plain, dense), td, flow=flow, **WAYS[way])
    torch.testing.assert_close(found["attr", "input"], expected["attr", "input"], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout: str, way: str) -> None:
    td = states()
    found = explained(Graph(lambda a, h: a @ h, LAYOUTS[layout]()), td, **WAYS[way])
    expected = explained(Graph(lambda a, h: a @ h, DENSE), td, **WAYS[way])
    torch.testing.assert_close(found["attr", "input"], expected["attr", "input"], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("way", WAYS)
def test_sparse_weights_of_a_layer(way: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 2))
    net[0].weight = nn.Parameter(torch.where(net[0].weight > 0.1, net[0].weight, 0.0).detach())
    td = TensorDict(input=torch.randn(4, 5), batch_size=[4])
    expected = explained(net, td, **WAYS[way])
    net[0].weight = nn.Parameter(net[0].weight.detach().to_sparse_csr())
    found = explained(net, td, **WAYS[way])
    torch.testing.assert_close(found["attr", "input"], expected["attr", "input"], rtol=1e-10, atol=1e-12)


def test_a_large_one_that_is_overwritten_counts_as_it_is() -> None:
    """Of a reference, what was computed is kept for as long as the constants it was computed with stay."""
    places = torch.arange(200)
    held = torch.sparse_coo_tensor(torch.stack([places, places.flip(0)]), torch.rand(200), (200, 200))

    class Held(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first = nn.Linear(200, 200)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(held @ torch.relu(self.first(x)).t()).t()

    td, method = TensorDict(input=torch.randn(2, 200), batch_size=[2]), WAYS["reference"]
    module = LRP("deeplift", target=Target("output", 3), baseline=0.3).wrap(Held())
    before = module(td.clone())["attr", "input"]
    held._values().mul_(2)
    after = module(td.clone())["attr", "input"]
    fresh = LRP(method["rules"], target=Target("output", 3), baseline=0.3).wrap(Held())(td.clone())
    torch.testing.assert_close(after, fresh["attr", "input"])
    assert not torch.allclose(after, before)


LIVE = {
    "sparse_coo_tensor": lambda a, h: torch.sparse_coo_tensor(PLACES, h[PLACES[0], 0], a.shape) @ h,
    "to_sparse": lambda a, h: a @ h.to_sparse().to_dense(),
    "sparse_mask": lambda a, h: (h @ h.t()).sparse_mask(a).to_dense() @ h,
    "mul": lambda a, h: (a * (h @ h.t())).to_dense() @ h,
}


@pytest.mark.parametrize("flow", ["relevance", "gradient"])
@pytest.mark.parametrize("ledger", [False, True])
@pytest.mark.parametrize("step", LIVE)
def test_one_that_depends_on_what_is_explained_is_refused(step: str, ledger: bool, flow: str) -> None:
    model, td = Graph(LIVE[step], DENSE.to_sparse().coalesce()), states()
    module = LRP("attn_lrp", target=Target("output", 0), flow=flow, ledger=ledger).wrap(model)
    with pytest.raises(
        NotImplementedError, match=r"makes or reads a sparse tensor \(\[6, \d\], torch.sparse_coo\)"
    ):
        module(td.clone())
    torch.testing.assert_close(model(td["input"]), Graph(LIVE[step], model.neighbours)(td["input"]))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "method",
    [
        Gradient(Target("output", 0)),
        IntegratedGradients(Target("output", 0), steps=4),
        Occlusion(Target("output", 0), window=2),
    ],
    ids=lambda method: type(method).__name__,
)
def test_methods_without_rules_take_it(method, training: bool) -> None:
    td = states()

    def dense(a: Tensor, h: Tensor) -> Tensor:
        return torch.zeros_like(DENSE).index_put((PLACES[0], PLACES[1]), h[PLACES[0], 0]) @ h

    sparse, plain = Graph(LIVE["sparse_coo_tensor"], DENSE.to_sparse()), Graph(dense, DENSE)
    found, expected = (
        method.wrap(net.train(training))(td.clone())["attr", "input"] for net in (sparse, plain)
    )
    torch.testing.assert_close(found, expected)


def test_a_matrix_among_the_entries() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor, neighbours: Tensor) -> Tensor:
            return (neighbours @ F.relu(self.layer(x))).flatten()

    x = torch.randn(SIZE, 3)
    td = TensorDict(x=x, a=DENSE.to_sparse(), batch_size=[])
    module = LRP("attn_lrp", target=Target("output", 1), ledger=True).wrap(Two(), in_keys=["x", "a"])
    with pytest.warns(UserWarning, match="input 'a' is sparse: it gets no relevance entry"):
        found = module(td.clone())
    assert set(found["attr"].keys()) == {"x"}
    held = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
    held[0].load_state_dict(module.module.layer.state_dict())

    class One(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (DENSE @ held(x)).flatten()

    expected = LRP("attn_lrp", target=Target("output", 1)).wrap(One(), in_keys=["x"])(TensorDict(x=x))
    torch.testing.assert_close(found["attr", "x"], expected["attr", "x"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equal_ones(layout: str) -> None:
    one, other = LAYOUTS[layout](), LAYOUTS[layout]()
    assert one.layout in SPARSE and equal(one, other) and not equal(one, DENSE)
    (other._values() if layout == "coo" else other.values()).mul_(2)
    assert not equal(one, other) and equal(DENSE, DENSE.clone())


HELD = {
    "nested": lambda w: torch.nested.nested_tensor([w[:2], w[2:]]),
    "jagged": lambda w: torch.nested.nested_tensor([w[:2], w[2:]], layout=torch.jagged),
    "mkldnn": lambda w: w.float().to_mkldnn(),
    "quantised": lambda w: torch.quantize_per_tensor(w.float(), 0.1, 0, torch.qint8),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:torch.quantize")
@pytest.mark.parametrize("held", HELD)
def test_a_model_may_hold_a_tensor_of_any_kind(held: str) -> None:
    """What it holds is compared with what it held, to see whether a run has changed it."""
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh()).train()
    td = TensorDict(input=torch.randn(2, 4), batch_size=[2])
    expected = explained(net, td)["attr", "input"]
    net[1].register_buffer("held", HELD[held](torch.randn(4, 4)))
    torch.testing.assert_close(explained(net, td)["attr", "input"], expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("preset, baseline", [("epsilon", None), ("attn_lrp", None), ("deeplift", 0.0)])
def test_a_quantised_layer_is_refused(preset: str, baseline: float | None) -> None:
    layer = nn.Linear(4, 3, dtype=torch.float32)
    layer.qconfig = torch.ao.quantization.default_dynamic_qconfig
    net = nn.Sequential(
        nn.Linear(4, 4, dtype=torch.float32), torch.ao.nn.quantized.dynamic.Linear.from_float(layer)
    )
    td = TensorDict(input=torch.randn(2, 4, dtype=torch.float32), batch_size=[2])
    with pytest.raises(NotImplementedError, match=r"`linear_dynamic`.* has no derivative.*quantised"):
        LRP(preset, target=Target("output", 0), baseline=baseline).wrap(net)(td)


def test_other_errors_of_torch_are_its_own() -> None:
    model = Graph(lambda a, h: a @ h[:2], DENSE.to_sparse())
    with pytest.raises(RuntimeError, match=r"(?i)mat|size|shape") as caught:
        LRP("attn_lrp", target=Target("output", 0)).wrap(model)(states())
    assert not isinstance(caught.value, Live)
    sparse, tree = DENSE.to_sparse(), {"a": [DENSE, DENSE.to_sparse()]}
    for error in (torch.OutOfMemoryError(), RuntimeError("mat1 and mat2"), Live(sparse)):
        assert at_fault(error, tree) is None
    assert (
        at_fault(NotImplementedError(), tree) is tree["a"][1]
        and at_fault(NotImplementedError(), DENSE) is None
    )
