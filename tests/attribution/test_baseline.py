"""LRP against a baseline: the difference of what is explained is shared, and all of it arrives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from differences import FLOWS, PRESETS, explained, mlp, td_of
from torch import Tensor, nn

from tdhook import LRP, Target
from tdhook.composites import epsilon_gamma_box
from tdhook.relevance.rules import definitions
from tdhook.rules import (
    AlphaBetaRule,
    EpsilonRule,
    FlatRule,
    GammaRule,
    SignalTakeAllRule,
    WSquareRule,
    ZBoxRule,
    ZPlusRule,
)
from tdhook.selectors import Op
from tdhook.targets import Computed

pytestmark = pytest.mark.usefixtures("doubles")


class Cnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3)
        self.norm, self.pool, self.head = nn.BatchNorm2d(4), nn.MaxPool2d(2), nn.Linear(16, 3)
        self.norm.running_mean.uniform_(-0.5, 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(torch.relu(self.norm(self.first(x))))
        return self.head(torch.relu(self.second(x)).flatten(1))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(4), nn.MultiheadAttention(4, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        x = x + self.attention(y, y, y)[0]
        return self.head((x + self.mlp(x)).mean(1))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (6,)),
    "cnn": (lambda: Cnn().eval(), (2, 8, 8)),
    "transformer": (lambda: Block().eval(), (3, 4)),
}


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("composite", PRESETS)
def test_every_preset_is_balanced(composite: str, name: str, flow: str) -> None:
    make, shape = MODELS[name]
    model, x, start = make(), torch.randn(4, *shape), torch.randn(4, *shape)
    wanted = (model(x) - model(start)).detach()[:, 0]
    td = explained(model, x, start, composite, flow=flow, ledger=True)
    torch.testing.assert_close(td["ledger", "target"], wanted)
    assert td["ledger", "gap"].abs().max() <= 1e-9 * wanted.abs().max()
    arrived = td["attr", "input"].flatten(1).sum(1)
    torch.testing.assert_close(arrived, td["ledger", "inputs"], rtol=1e-9, atol=1e-9)
    if composite.startswith("deeplift"):
        torch.testing.assert_close(arrived, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("flow", FLOWS)
def test_a_preset_with_bounds(flow: str) -> None:
    model, x, start = Cnn().eval(), torch.rand(4, 2, 8, 8), torch.rand(4, 2, 8, 8)
    td = explained(model, x, start, epsilon_gamma_box(0.0, 1.0), flow=flow, ledger=True)
    assert td["ledger", "gap"].abs().max() <= 1e-9 * td["ledger", "target"].abs().max()


@pytest.mark.parametrize("name", MODELS)
def test_flows_agree(name: str) -> None:
    make, shape = MODELS[name]
    model, x, start = make(), torch.randn(4, *shape), torch.randn(4, *shape)
    relevance, gradient = (explained(model, x, start, flow=flow)["attr", "input"] for flow in FLOWS)
    torch.testing.assert_close(relevance, gradient, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("name", MODELS)
def test_single_precision(name: str, flow: str) -> None:
    make, shape = MODELS[name]
    model, x, start = make().float(), torch.randn(4, *shape).float(), torch.randn(4, *shape).float()
    td = explained(model, x, start, flow=flow, ledger=True)
    scale = td["attr", "input"].flatten(1).abs().sum(1).max()
    assert td["ledger", "gap"].abs().max() <= 1e-5 * scale
    wanted = (model(x) - model(start)).detach()[:, 0]
    assert (td["attr", "input"].flatten(1).sum(1) - wanted).abs().max() <= 1e-5 * scale


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("composite", PRESETS)
def test_nothing_differs(composite: str, flow: str) -> None:
    model, x = mlp(), torch.randn(4, 6)
    td = explained(model, x, x.clone(), composite, flow=flow, ledger=True)
    assert (td["attr", "input"] == 0).all() and (td["ledger", "gap"] == 0).all()


@pytest.mark.parametrize("flow", FLOWS)
def test_some_features_and_some_rows_differ(flow: str) -> None:
    model, x = mlp(), torch.randn(4, 6)
    start = x.clone()
    start[:2, 3] = 0.5
    td = explained(model, x, start, flow=flow, ledger=True)
    relevance = td["attr", "input"]
    assert (
        relevance.isfinite().all()
        and (relevance[2:] == 0).all()
        and (relevance[:, [0, 1, 2, 4, 5]] == 0).all()
    )
    torch.testing.assert_close(relevance[:2, 3], (model(x) - model(start))[:2, 0].detach())


RULES = {
    "epsilon": (lambda: EpsilonRule(0.01), lambda *args: definitions.epsilon(*args, 0.01)),
    "z-plus": (
        lambda: ZPlusRule(0.01),
        lambda *args: definitions.alpha_beta(*args, 0.01, alpha=1.0, beta=0.0),
    ),
    "alpha-beta": (
        lambda: AlphaBetaRule(3.0, 2.0, 0.01),
        lambda *args: definitions.alpha_beta(*args, 0.01, alpha=3.0, beta=2.0),
    ),
    "gamma": (lambda: GammaRule(0.7, 0.01), lambda *args: definitions.gamma(*args, 0.01, gamma=0.7)),
    "w-square": (lambda: WSquareRule(0.0), lambda d, w, b, r: _per_weight(w.square(), r)),
    "flat": (lambda: FlatRule(0.0), lambda d, w, b, r: _per_weight(torch.ones_like(w), r)),
}


LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), (6,)),
    "conv2d": (lambda: nn.Conv2d(2, 3, 2, stride=2), (2, 4, 4)),
    "grouped": (lambda: nn.Conv1d(4, 6, 2, groups=2, bias=False), (4, 5)),
    "transposed": (lambda: nn.ConvTranspose1d(2, 3, 2, stride=2), (2, 4)),
}


def _per_weight(weight: Tensor, relevance: Tensor) -> Tensor:
    """``sum_j w_ji R_j / sum_i w_ji``."""
    return relevance / weight.sum(1) @ weight


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("rule", RULES)
def test_a_rule_is_its_definition_on_differences(rule: str, layer: str, flow: str) -> None:
    """``dx`` in place of ``x``, ``dz`` in place of ``z``, and no bias."""
    make, definition = RULES[rule]
    (make_layer, shape), x, start = LAYERS[layer], None, None
    module = make_layer()
    if layer != "linear" and rule in ("flat", "w-square"):
        pytest.skip("which inputs are in reach is no matter of weights")
    x, start = torch.randn(3, *shape), torch.randn(3, *shape)
    weight = torch.autograd.functional.jacobian(lambda x: module(x).flatten(), torch.zeros(1, *shape))
    weight = weight.reshape(weight.shape[0], -1)
    seed = torch.randn(len(weight))
    td = explained(
        nn.Sequential(module, nn.Flatten()),
        x,
        start,
        [(type(module), make())],
        target=Computed(lambda outputs, inputs: outputs["output"] @ seed),
        flow=flow,
    )
    rise = (module(x) - module(start)).detach().flatten(1)
    expected = definition((x - start).flatten(1), weight, torch.zeros(len(weight)), seed * rise)
    torch.testing.assert_close(td["attr", "input"].flatten(1), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("flow", FLOWS)
def test_a_box_is_one_of_differences(flow: str) -> None:
    """``dx w - (low - x0) w+ - (high - x0) w-``, for a box that has both in it."""
    layer, x, start = nn.Linear(6, 5), torch.rand(3, 6), torch.rand(3, 6)
    box = ZBoxRule(-1.0, 2.0, 0.0)
    td = explained(layer, x, start, [(nn.Linear, box)], target=Target("output", 1), flow=flow)
    weight = layer.weight[1].detach()
    low, high = -1.0 - start, 2.0 - start
    shares = (x - start) * weight - low * weight.clamp(min=0) - high * weight.clamp(max=0)
    rise = (layer(x) - layer(start))[:, 1:2].detach()
    torch.testing.assert_close(td["attr", "input"], shares / shares.sum(1, keepdim=True) * rise)


@pytest.mark.parametrize("flow", FLOWS)
def test_each_operation_hands_on_what_arrives(flow: str) -> None:
    """The account of every call closes, in relevance and not in what it is per unit."""
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 3), nn.Softmax(-1))
    x, start = torch.randn(3, 6), torch.randn(3, 6)
    lrp = LRP("deeplift", target=Target("output", 1), baseline=start, flow=flow, ledger=True)
    with lrp.prepare(model) as run:
        target = run(td_of(x))["ledger", "target"]
        entries = run.ledger.entries
    assert len(entries) == 5 and not any(entry.opens(1e-9) for entry in entries)
    for entry in entries:
        torch.testing.assert_close(entry.of("arrived"), target)
        torch.testing.assert_close(entry.of("left"), target)


class Extremes(nn.Module):
    """An operation of two values, which count differently."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        least, greatest = torch.aminmax(self.layer(x), dim=-1, keepdim=True)
        return least + 3 * greatest


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.signal, self.gate = nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.gate(x)) * self.signal(x)


@pytest.mark.parametrize("flow", FLOWS)
def test_an_operation_of_two_values(flow: str) -> None:
    model, x, start = Extremes(), torch.randn(3, 6), torch.randn(3, 6)
    td = explained(model, x, start, "deeplift", target=Target("output", 0), flow=flow)
    wanted = (model(x) - model(start))[:, 0].detach()
    torch.testing.assert_close(td["attr", "input"].sum(1), wanted)


@pytest.mark.parametrize("flow", FLOWS)
def test_a_signal_takes_what_its_gate_lets_through(flow: str) -> None:
    """The gate is held at the mean of both of its values, and gets nothing."""
    model, x, start = Gated(), torch.randn(3, 6), torch.randn(3, 6)
    composite = [(nn.Linear, EpsilonRule(0.0)), (Op("mul"), SignalTakeAllRule())]
    td = explained(model, x, start, composite, target=Target("output", 1), flow=flow)
    with torch.no_grad():
        gate = (torch.sigmoid(model.gate(x)) + torch.sigmoid(model.gate(start)))[:, 1:2] / 2
    torch.testing.assert_close(td["attr", "input"], (x - start) * model.signal.weight[1].detach() * gate)


@pytest.mark.parametrize("through_zero", [False, True])
@pytest.mark.parametrize("flow", FLOWS)
def test_a_norm(flow: str, through_zero: bool) -> None:
    """``|x| - |x0|`` is shared by ``(x + x0) (x - x0) / (|x| + |x0|)``, also where the way has a kink."""
    start = torch.randn(3, 6)
    x = -2.5 * start if through_zero else torch.randn(3, 6)
    norm = Computed(lambda outputs, inputs: torch.linalg.vector_norm(outputs["output"], dim=-1))
    td = explained(nn.Identity(), x, start, "deeplift", target=norm, flow=flow)
    sizes = x.norm(dim=1, keepdim=True) + start.norm(dim=1, keepdim=True)
    torch.testing.assert_close(td["attr", "input"], (x + start) * (x - start) / sizes)
