"""Layers together with what is behind them: equal to the definitions, and all of the difference arrives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import permutations

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from rules.revealed import (
    DEFINITIONS,
    FLOWS,
    FUNCTIONS,
    MODELS,
    Definition,
    each_preset,
    explained,
    networks,
    relevance,
    reveal_cancel,
    shapley,
    slope,
)
from tdhook import LRP, Target
from tdhook.targets import Computed

from .layers import CASES, DTYPE, Case

pytestmark = pytest.mark.usefixtures("doubles")


def of_network(
    define: Definition, layers: Sequence[nn.Module], x: Tensor, start: Tensor, counts: Tensor
) -> Tensor:
    """Relevance per unit of one sample by a chain of linear layers, each with a function behind it or without."""
    if not layers:
        return counts
    layer, *rest = layers
    function = rest.pop(0) if rest and not isinstance(rest[0], nn.Linear) else None
    ends = [layer(value) for value in (x, start)]
    behind = [z if function is None else function(z) for z in ends]
    counts = of_network(define, rest, *behind, counts)
    weight = layer.weight * counts.unsqueeze(1)
    if function is not None:
        weight = weight * define(layer.weight * (x - start), ends[1], function)
    return weight.sum(0)


@each_preset
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_a_layer_and_the_function_behind_it(case: Case, function: str, preset_: str) -> None:
    layer, matrix, behind = case.layer, case.explicit, FUNCTIONS[function]()
    x, counts = case.draw(True, 2)
    start, _ = case.draw(False, 2)
    flat = counts.flatten(1)
    expected = []
    for end, begin, count in zip(x, start, flat, strict=True):
        step = (end - begin).flatten()[matrix.source]
        before = matrix.weight @ begin.flatten()[matrix.source] + matrix.bias
        each = DEFINITIONS[preset_](matrix.weight * step, before, behind)
        each = each * count.unsqueeze(1) * matrix.weight
        expected.append(matrix.spread(each.sum(0) * step).view(case.in_shape))
    found = relevance(
        nn.Sequential(layer, behind),
        x,
        start,
        preset_,
        target=Computed(lambda outputs, inputs: (outputs["output"].flatten(1) * flat).sum(1)),
    )
    torch.testing.assert_close(found, torch.stack(expected).to(DTYPE), rtol=1e-9, atol=1e-9)


@each_preset
@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_network(function: str, preset_: str) -> None:
    """Features that do not differ, and units behind a ReLU that do not, count the mean of both."""
    model, x, start = networks(function), torch.randn(6, 5), torch.randn(6, 5)
    start[:, 2] = x[:, 2]
    start[0] = x[0]
    counts = torch.tensor([0.0, 1.0, 0.0])
    expected = [
        of_network(DEFINITIONS[preset_], list(model), end, begin, counts) * (end - begin)
        for end, begin in zip(x, start, strict=True)
    ]
    found = relevance(model, x, start, preset_, target=Target("output", 1))
    torch.testing.assert_close(found, torch.stack(expected).detach(), rtol=1e-9, atol=1e-9)


class Least(nn.Module):
    """The lesser of two, as it is computed with one ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Linear(2, 1, bias=False)
        self.both.weight.data = torch.tensor([[1.0, -1.0]])

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :1] - torch.relu(self.both(x))


@pytest.mark.parametrize("flow", FLOWS)
def test_what_cancels_is_seen(flow: str) -> None:
    """The example of the paper: both are as much the reason, and the secant takes one of them for it."""
    x = torch.tensor([[3.0, 1.0], [1.0, 3.0], [2.0, 2.0]])
    half = x.min(1, keepdim=True).values / 2
    found = relevance(Least(), x, 0.0, flow=flow)
    torch.testing.assert_close(found[:1], half[:1].expand(1, 2))
    if flow == "gradient":
        torch.testing.assert_close(found, half.expand(3, 2))
    assert relevance(Least(), x[:1], 0.0, "deeplift")[0, 0].abs() < 1e-12


def exact(contributions: Tensor, start: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Shapley values of a few contributions, over all orders."""
    orders = torch.tensor(list(permutations(range(contributions.shape[1]))))
    total = torch.zeros_like(contributions)
    for order in orders:
        on = torch.cat([start.unsqueeze(1), start.unsqueeze(1) + contributions[:, order].cumsum(1)], 1)
        total[:, order] += function(on).diff(dim=1)
    return total / len(orders)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_what_a_unit_gets_is_nearly_its_shapley_values(function: str) -> None:
    """Nearer than what two groups say, and that nearer than the secant."""
    weight, behind = torch.randn(200, 6), FUNCTIONS[function]()
    start = torch.randn(200)
    wanted = exact(weight, start, behind)
    off = []
    for define in (shapley, reveal_cancel):
        found = define(weight, start, behind) * weight
        torch.testing.assert_close(found.sum(1), wanted.sum(1))
        off.append(float((found - wanted).norm() / wanted.norm()))
    secant = slope(behind, start, start + weight.sum(1)).unsqueeze(1) * weight
    assert off[0] < off[1] < (secant - wanted).norm() / wanted.norm()


@each_preset
@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("name", MODELS)
def test_all_of_the_difference_arrives(name: str, flow: str, preset_: str) -> None:
    model, x, start = MODELS[name](), torch.randn(4, 5), torch.randn(4, 5)
    torch.manual_seed(0)
    end = model(x)
    torch.manual_seed(0)
    wanted = (end - model(start)).detach()[:, 0]
    for ledger in (False, True):
        torch.manual_seed(0)
        td = explained(model, x, start, preset_, flow=flow, ledger=ledger)
        torch.testing.assert_close(td["attr", "input"].sum(1), wanted, rtol=1e-9, atol=1e-9)
        if ledger:
            assert td["ledger", "gap"].abs().max() <= 1e-9


@each_preset
@pytest.mark.parametrize("name", ["network", "odd", "normed"])
def test_single_precision(name: str, preset_: str) -> None:
    model, x, start = MODELS[name](), torch.randn(4, 5), torch.randn(4, 5)
    expected = relevance(model, x, start, preset_)
    found = relevance(model.float(), x.float(), start.float(), preset_).double()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@each_preset
@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype, flow: str, preset_: str) -> None:
    model, x, start = networks("tanh").to(dtype), torch.randn(4, 5).to(dtype), torch.randn(4, 5).to(dtype)
    found = relevance(model, x, start, preset_, flow=flow)
    expected = relevance(model.double(), x.double(), start.double(), preset_)
    assert found.dtype == dtype
    assert torch.cosine_similarity(found.double(), expected).min() > 0.99


@pytest.mark.parametrize("name", ["network", "odd", "normed"])
def test_each_operation_hands_on_what_arrives(name: str) -> None:
    model, x, start = MODELS[name](), torch.randn(4, 5), torch.randn(4, 5)
    lrp = LRP("deeplift_reveal_cancel", target=Target("output", 0), baseline=start, ledger=True)
    with lrp.prepare(model) as run:
        run(TensorDict({"input": x}, [4]))
        entries = run.ledger.entries
    assert entries and not any(entry.opens(1e-9) for entry in entries)
