"""Expected and blurred gradients, conductance and influence: written out, step by step."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from torch import Tensor, nn

from tdhook import LRP, References, Target
from tdhook.attribution import (
    BlurIntegratedGradients,
    Conductance,
    Deconvnet,
    ExpectedGradients,
    GuidedBackprop,
    IntegratedGradients,
    InternalInfluence,
    ShapleySampling,
)
from tdhook.perturbing.baselines import blurred
from tdhook.perturbing.quadrature import quadrature

EXACT = {"rtol": 1e-9, "atol": 1e-12}
TARGETS = pytest.mark.parametrize("index", [1, "all"])
SHAPES = pytest.mark.parametrize("shape", [(), (4,), (2, 3)], ids=str)
BUDGETS = pytest.mark.parametrize("budget", [None, 0, 2000])


class AnyBatch(nn.Module):
    """A model of pictures, of any batch shape."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.reshape(-1, *x.shape[-3:])).reshape(*x.shape[:-3], -1)


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Softplus(), nn.Linear(8, 3)).double()


def cnn() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(144, 3)).double()


def gradients(net: nn.Module, x: Tensor, at: int | None = None) -> tuple[Tensor, Tensor]:
    """The gradient of each output, ``[*batch, outputs, *features]``, and the value it is one of."""
    x = x.detach().requires_grad_()
    value = x if at is None else net[: at + 1](x)
    z = net(x) if at is None else net[at + 1 :](value)
    grads = [torch.autograd.grad(z[..., i].sum(), value, retain_graph=True)[0] for i in range(3)]
    dims = x.dim() - (1 if x.shape[-1] == 4 else 3)
    return torch.stack(grads, dims), value.detach().unsqueeze(dims)


def of(found: Tensor, index: int | str, axis: int) -> Tensor:
    """The output that was asked for."""
    return found if index == "all" else found.select(axis, int(index))


@TARGETS
@SHAPES
@BUDGETS
def test_expected_gradients(index, shape, budget) -> None:
    net, x, data = mlp(), torch.randn(*shape, 4).double(), torch.randn(9, 4).double()
    baseline = TensorDict({"input": data}, [9])
    method = ExpectedGradients(
        Target("output", index), baseline=baseline, samples=6, ledger=True, memory_budget=budget
    )
    td = TensorDict({"input": x}, shape)
    found = method.wrap(net)(td.clone())
    drawn = References("sample", 6, baseline).of({"input": x}, {"input": len(shape)}, td)
    assert sorted(int(6 * place) for place in method.places) == list(range(6))  # one in each stretch
    total, start = torch.zeros(()), torch.zeros(())
    for place, one in zip(method.places, drawn, strict=True):
        reference = one.replaced["input"]
        grad, _ = gradients(net, reference + place * (x - reference))
        total = total + (x - reference).unsqueeze(-2) * grad / 6
        start = start + net(reference) / 6
    torch.testing.assert_close(found["attr", "input"], of(total, index, len(shape)), **EXACT)
    rise = of((net(x) - start).unsqueeze(-1), index, len(shape))[..., 0]
    torch.testing.assert_close(found["ledger", "target"], rise, **EXACT)
    gap = rise - of(total.sum(-1, keepdim=True), index, len(shape))[..., 0]
    torch.testing.assert_close(found["ledger", "gap"], gap, rtol=1e-7, atol=1e-12)


def test_the_gap_of_expected_gradients_goes_with_samples() -> None:
    net, data = mlp(), TensorDict({"input": torch.randn(50, 4).double()}, [50])
    td, gaps = TensorDict({"input": torch.randn(30, 4).double()}, [30]), []
    for samples in (4, 64, 1024):
        method = ExpectedGradients(Target("output", 1), baseline=data, samples=samples, ledger=True)
        gaps.append(float(method.wrap(net)(td.clone())["ledger", "gap"].square().mean().sqrt()))
    assert gaps[1] < gaps[0] / 2
    assert gaps[2] < gaps[1] / 2


def test_expected_gradients_spread() -> None:
    net, td = mlp(), TensorDict({"input": torch.randn(5, 4).double()}, [5])
    drawn = References("sample", 6, td.clone(), spread=True)
    method = ExpectedGradients(Target("output", 1), baseline=drawn)
    found = method.wrap(net)(td.clone())
    each = []
    for place, one in zip(method.places, drawn.of({"input": td["input"]}, {"input": 1}, td), strict=True):
        reference = one.replaced["input"]
        grad, _ = gradients(net, reference + place * (td["input"] - reference))
        each.append((td["input"] - reference) * grad[:, 1])
    torch.testing.assert_close(found["spread", "input"], torch.stack(each).std(0), **EXACT)


def test_expected_gradients_need_something_to_draw() -> None:
    with pytest.raises(ValueError, match='samples=32 are drawn of data: give baseline="sample"'):
        ExpectedGradients(baseline=0.0)


@TARGETS
@SHAPES
@BUDGETS
def test_conductance(index, shape, budget) -> None:
    net, x, steps = mlp(), torch.randn(*shape, 4).double(), 10
    method = Conductance(
        Target("output", index),
        input_modules=["1", "2"],
        baseline=0.3,
        steps=steps,
        ledger=True,
        memory_budget=budget,
    )
    found = method.wrap(net)(TensorDict({"input": x}, shape))
    for key, at in (("input", None), ("1", 1), ("2", 2)):
        total = torch.zeros(())
        points = [0.3 + (x - 0.3) * i / steps for i in range(steps + 1)]
        for before, after in itertools.pairwise(points):
            (one, h), (other, there) = gradients(net, before, at), gradients(net, after, at)
            total = total + (there - h) * (one + other) / 2
        torch.testing.assert_close(found["attr", key], of(total, index, len(shape)), **EXACT)
    rise = net(x) - net(torch.full((4,), 0.3, dtype=torch.double))
    rise = rise if index == "all" else rise[..., 1]
    torch.testing.assert_close(found["ledger", "target"], rise, **EXACT)
    torch.testing.assert_close(found["ledger", "inputs"], found["attr", "input"].sum(-1), **EXACT)


@given(st.integers(0, 100))
@settings(max_examples=8)
def test_all_that_a_way_goes_through_conducts_the_difference(seed) -> None:
    torch.manual_seed(seed)
    net, x = mlp(), torch.randn(5, 4).double()
    method = Conductance(Target("output", 1), input_modules=["1", "3"], steps=400)
    found = method.wrap(net)(TensorDict({"input": x}, [5]))
    rise = (net(x) - net(0 * x))[:, 1]
    for key in ("input", "1", "3"):
        torch.testing.assert_close(found["attr", key].sum(-1), rise, rtol=0, atol=1e-4)


@TARGETS
@SHAPES
@BUDGETS
@pytest.mark.parametrize("rule", ["gauss_legendre", "left"])
def test_influence(index, shape, budget, rule) -> None:
    net, x = mlp(), torch.randn(*shape, 4).double()
    method = InternalInfluence(
        Target("output", index),
        input_modules=["1"],
        baseline=0.3,
        steps=6,
        rule=rule,
        memory_budget=budget,
    )
    found = method.wrap(net)(TensorDict({"input": x}, shape))
    for key, at in (("input", None), ("1", 1)):
        total = sum(
            weight * gradients(net, 0.3 + place * (x - 0.3), at)[0] for place, weight in quadrature(rule, 6)
        )
        torch.testing.assert_close(found["attr", key], of(total, index, len(shape)), **EXACT)


@pytest.mark.parametrize("make", [Conductance, InternalInfluence])
def test_inputs_go_their_way_where_layers_alone_are_asked_for(make) -> None:
    net, td = mlp(), TensorDict({"input": torch.randn(5, 4).double()}, [5])
    both = make(Target("output", 1), input_modules=["1"]).wrap(net)(td.clone())
    alone = make(Target("output", 1), input_modules=["1"], use_inputs=False).wrap(net)(td.clone())
    assert list(alone["attr"].keys()) == ["1"]
    torch.testing.assert_close(alone["attr", "1"], both["attr", "1"], **EXACT)
    spread = References("sample", 3, td.clone(), spread=True)
    found = make(Target("output", 1), input_modules=["1"], baseline=spread).wrap(net)(td.clone())
    each = [
        make(Target("output", 1), input_modules=["1"], baseline=spread.only(i)).wrap(net)(td.clone())[
            "attr", "1"
        ]
        for i in range(3)
    ]
    torch.testing.assert_close(found["attr", "1"], torch.stack(each).mean(0), **EXACT)
    torch.testing.assert_close(found["spread", "1"], torch.stack(each).std(0), **EXACT)


@pytest.mark.parametrize("make", [Conductance, InternalInfluence])
@pytest.mark.filterwarnings("ignore:input 'input' is torch.int64")
def test_tokens_go_no_way(make) -> None:
    net = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 3))
    td = TensorDict({"input": torch.randint(9, (5, 3))}, [5])
    method = make(Target("output", 1), input_modules=["0"], use_inputs=False)
    with pytest.raises(
        ValueError, match=r"none of the inputs \('input'\) is floating-point, so that none comes"
    ):
        method.wrap(net)(td)


@TARGETS
@pytest.mark.parametrize("shape", [(), (3,), (2, 3)], ids=str)
@BUDGETS
def test_blurred_pictures(index, shape, budget) -> None:
    net, x, steps, width = cnn(), torch.rand(*shape, 2, 8, 8).double(), 6, 2.0
    flat = AnyBatch(net)
    method = BlurIntegratedGradients(
        Target("output", index), width=width, steps=steps, ledger=True, memory_budget=budget
    )
    found = method.wrap(net)(TensorDict({"input": x}, shape))

    def seen(i: int) -> Tensor:
        rows = x.reshape(-1, 2, 8, 8)
        return (x if i == steps else blurred(width * (1 - i / steps))(rows)).reshape(x.shape)

    total = torch.zeros(())
    for i in range(steps):
        step = (seen(i + 1) - seen(i)).unsqueeze(len(shape))
        total = total + step * (gradients(flat, seen(i))[0] + gradients(flat, seen(i + 1))[0]) / 2
    torch.testing.assert_close(found["attr", "input"], of(total, index, len(shape)), **EXACT)
    rise = flat(x) - flat(seen(0))
    rise = rise if index == "all" else rise[..., 1]
    torch.testing.assert_close(found["ledger", "target"], rise, **EXACT)


def test_what_is_no_picture_is_not_blurred() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen, self.state = nn.Conv2d(2, 3, 3), nn.Linear(4, 3)

        def forward(self, picture: Tensor, state: Tensor) -> Tensor:
            return self.seen(picture).tanh().mean((-1, -2)) * self.state(state)

    td = TensorDict({"picture": torch.rand(3, 2, 8, 8).double(), "state": torch.randn(3, 4).double()}, [3])
    for index in (1, "all"):
        method = BlurIntegratedGradients(Target("output", index), ledger=True, steps=64)
        explained = method.wrap(Two().double(), in_keys=["picture", "state"])
        found = explained(td.clone())
        assert found["attr", "state"].shape == ((3, 4) if index == 1 else (3, 3, 4))
        assert not found["attr", "state"].any()
        assert set(explained.out_keys) <= set(found.keys(True, True))
        torch.testing.assert_close(found["ledger", "inputs"], found["ledger", "target"], rtol=0, atol=1e-3)
    with pytest.raises(ValueError, match=r"no input is a picture, .* that could be blurred: 'input' \[4\]"):
        BlurIntegratedGradients(Target("output", 1)).wrap(mlp())(
            TensorDict({"input": torch.rand(2, 4).double()}, [2])
        )


GUIDED = {"guided_backprop": GuidedBackprop, "deconvnet": Deconvnet}


@pytest.mark.parametrize("name, method", GUIDED.items(), ids=GUIDED)
def test_guided_methods_are_their_presets(name, method) -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    td = TensorDict({"input": torch.randn(5, 4).double()}, [5])
    found = method(Target("output", 1)).wrap(net)(td.clone())["attr", "input"]
    assert torch.equal(found, LRP(name, target=Target("output", 1)).wrap(net)(td.clone())["attr", "input"])
    x = td["input"]
    first = net[0](x)
    second = net[2](first.relu())
    grad = net[4].weight[1].expand(5, 8)
    for weight, z in ((net[2].weight, second), (net[0].weight, first)):
        grad = grad.clamp(min=0) * (z > 0 if method is GuidedBackprop else 1) @ weight
    torch.testing.assert_close(found, grad, **EXACT)


MADE = {
    "expected": (ExpectedGradients, mlp, (4,)),
    "conductance": (Conductance, mlp, (4,)),
    "influence": (InternalInfluence, mlp, (4,)),
    "blurred": (BlurIntegratedGradients, cnn, (2, 8, 8)),
}


@pytest.mark.parametrize("method, make, shape", MADE.values(), ids=MADE)
def test_copies(method, make, shape) -> None:
    explained = method(Target("output", 1)).wrap(make())
    td = TensorDict({"input": torch.rand(3, *shape).double()}, [3])
    found = explained(td.clone())
    for other in (copy.deepcopy(explained), pickle.loads(pickle.dumps(explained))):
        assert torch.equal(other(td.clone())["attr", "input"], found["attr", "input"])


class Summing(nn.Module):
    """Each step sees all before it, ``[*batch, time, 4]``."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).tanh().cumsum(-2)


@pytest.mark.parametrize(
    "make",
    [
        lambda **options: IntegratedGradients(Target("output", 1), **options),
        lambda **options: Conductance(Target("output", 1), steps=500, **options),
        lambda **options: ShapleySampling(Target("output", 1), permutations=2, **options),
    ],
)
def test_accounts_of_elements_that_depend_on_each_other_open_no_gap(make) -> None:
    torch.manual_seed(0)
    net, td = Summing().double(), TensorDict({"input": torch.randn(2, 5, 4).double()}, [2, 5])
    found = make(baseline=0.3, ledger=True).wrap(net)(td.clone())
    with torch.no_grad():
        rise = (net(td["input"]) - net(torch.full_like(td["input"], 0.3)))[..., 1]
    torch.testing.assert_close(found["ledger", "target"], rise, **EXACT)
    gap, missing = found["ledger", "gap"], rise.sum(1) - found["attr", "input"].sum((1, 2))
    torch.testing.assert_close(
        gap.sum(1), missing, **EXACT
    )  # in sum over the steps, of which each has its share
    torch.testing.assert_close(gap, gap[:, :1].expand(2, 5), **EXACT)
    torch.testing.assert_close(found["ledger", "inputs"] + gap, rise, **EXACT)


@pytest.mark.parametrize("index", [1, "all"])
def test_what_goes_past_layers_is_absorbed(index) -> None:
    class Past(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.rest = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.rest((x + self.two(self.one(x).tanh())).tanh())

    torch.manual_seed(0)
    net, td = Past().double(), TensorDict({"input": torch.randn(3, 4).double()}, [3])
    options = {"steps": 500, "ledger": True, "input_modules": ["one", "two"]}
    both, alone = (
        Conductance(Target("output", index), use_inputs=used, **options).wrap(net)(td.clone())
        for used in (True, False)
    )
    for layer in ("one", "two"):
        torch.testing.assert_close(alone["attr", layer], both["attr", layer], **EXACT)
    of_inputs, of_layer = both["attr", "input"].sum(-1), both["attr", "one"].sum(-1)
    torch.testing.assert_close(alone["ledger", "target"], both["ledger", "target"], **EXACT)
    torch.testing.assert_close(alone["ledger", "inputs"], of_layer, **EXACT)
    torch.testing.assert_close(alone["ledger", "absorbed"], of_inputs - of_layer, **EXACT)
    torch.testing.assert_close(alone["ledger", "gap"], both["ledger", "gap"], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("index", [1, "all"])
def test_what_inputs_conduct_that_are_not_attributed_is_absorbed(index) -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Linear(3, 4), nn.Linear(2, 4)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return (self.one(x) * self.other(y)).tanh()

    torch.manual_seed(0)
    net = Product().double()
    td = TensorDict({"x": torch.randn(3, 3).double(), "y": torch.randn(3, 2).double()}, [3])
    of_both, of_one = (
        Conductance(Target("output", index), steps=500, ledger=True, **options).wrap(net, ["x", "y"])(
            td.clone()
        )
        for options in ({}, {"attribute": ["x"]})
    )
    assert ("attr", "y") not in of_one.keys(True)
    torch.testing.assert_close(of_one["attr", "x"], of_both["attr", "x"], **EXACT)
    torch.testing.assert_close(of_one["ledger", "absorbed"], of_both["attr", "y"].sum(-1), **EXACT)
    torch.testing.assert_close(of_one["ledger", "gap"], of_both["ledger", "gap"], rtol=1e-6, atol=1e-12)
    assert of_one["ledger", "gap"].abs().max() < 1e-6


class Counting(nn.Module):
    """Counts its calls in a buffer that it computes with."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("calls", torch.zeros(1, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.net(x) * self.calls


@pytest.mark.parametrize(
    "make, shape, net",
    [
        (lambda **o: IntegratedGradients(Target("output", 1), ledger=True, **o), (4,), mlp),
        (lambda **o: IntegratedGradients(Target("output", 1), tolerance=1e-3, ledger=True, **o), (4,), mlp),
        (lambda **o: ExpectedGradients(Target("output", 1), samples=4, ledger=True, **o), (4,), mlp),
        (lambda **o: Conductance(Target("output", 1), steps=8, ledger=True, **o), (4,), mlp),
        (lambda **o: BlurIntegratedGradients(Target("output", 1), steps=4, ledger=True, **o), (2, 8, 8), cnn),
    ],
)
def test_accounts_of_a_model_that_counts_its_calls(make, shape, net) -> None:
    net, td = net(), TensorDict({"input": torch.randn(3, *shape).double()}, [3])
    counting = Counting(net)
    found, expected = make().wrap(counting)(td.clone()), make().wrap(net)(td.clone())
    for key in ("target", "inputs", "absorbed", "gap"):
        torch.testing.assert_close(found["ledger", key], expected["ledger", key], **EXACT)
    torch.testing.assert_close(found["attr", "input"], expected["attr", "input"], **EXACT)
    assert counting.calls.item() == 1


def test_accounts_in_training() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()
    td = TensorDict({"input": torch.randn(6, 4).double()}, [6])
    found = IntegratedGradients(Target("output", 1), steps=64, ledger=True).wrap(net)(td.clone())
    assert net[1].num_batches_tracked.item() == 1
    rise = (net(td["input"]) - net(torch.zeros(6, 4).double()))[:, 1].detach()
    torch.testing.assert_close(found["ledger", "target"], rise, **EXACT)
    torch.testing.assert_close(found["attr", "input"].sum(), rise.sum(), rtol=1e-2, atol=0)
