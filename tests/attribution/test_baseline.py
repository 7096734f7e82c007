"""LRP against a baseline: the difference of what is explained is shared, and all of it arrives."""

from __future__ import annotations

import gc
import threading
import warnings
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import Tensor, nn
from unchanged import Unchanged

import tdhook
from tdhook import LRP, Target
from tdhook.composites import epsilon_gamma_box, preset
from tdhook.relevance.rules import definitions
from tdhook.rules import (
    AlphaBetaRule,
    EpsilonRule,
    FlatRule,
    GammaRule,
    PropagationRule,
    SignalTakeAllRule,
    WSquareRule,
    ZBoxRule,
    ZPlusRule,
)
from tdhook.selectors import Op
from tdhook.targets import Computed, Contrast, Entropy, LogProb

FLOWS = ("relevance", "gradient")
PRESETS = (
    "attn_lrp",
    "cp_lrp",
    "deeplift",
    "deeplift_reveal_cancel",
    "deeplift_shapley",
    "epsilon",
    "epsilon_alpha2_beta1",
    "epsilon_alpha2_beta1_flat",
    "epsilon_plus",
    "epsilon_plus_flat",
    "excitation_backprop",
    "lstm_lrp",
)


pytestmark = pytest.mark.usefixtures("doubles")


def td_of(x: Tensor, dims: int = 1) -> TensorDict:
    return TensorDict({"input": x}, batch_size=x.shape[:dims])


def explained(
    model: nn.Module, x: Tensor, baseline: object, composite: object = "deeplift", **options: object
) -> TensorDict:
    options.setdefault("target", Target("output", 0))
    with LRP(composite, baseline=baseline, on_unmatched="raise", **options).prepare(model) as run:
        return run(td_of(x))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


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


# --- What arrives ---------------------------------------------------------------------------------


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


# --- Rules on layers ------------------------------------------------------------------------------

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


# --- Baselines ------------------------------------------------------------------------------------


def test_a_number_a_row_rows_and_a_function_say_the_same() -> None:
    model, x = mlp(), torch.randn(4, 6)
    wanted = explained(model, x, torch.zeros(4, 6))["attr", "input"]
    for baseline in (0.0, 0, torch.zeros(6), torch.zeros(1, 6), torch.zeros_like, {"input": 0.0}):
        torch.testing.assert_close(
            explained(model, x, baseline)["attr", "input"], wanted, rtol=1e-12, atol=1e-12
        )


def test_a_baseline_that_follows_the_input() -> None:
    model, x = mlp(), torch.randn(4, 6)
    found = explained(model, x, lambda rows: 0.5 * rows)["attr", "input"].sum(1)
    torch.testing.assert_close(found, (model(x) - model(x / 2)).detach()[:, 0])


def test_rows_of_several_axes() -> None:
    model, x, start = mlp(), torch.randn(2, 3, 6), torch.randn(2, 3, 6)
    for baseline in (start, start.reshape(6, 6), lambda rows: start.reshape(6, 6)):
        with LRP("deeplift", target=Target("output", 0), baseline=baseline).prepare(model) as run:
            found = run(td_of(x, 2))["attr", "input"].sum(-1)
        torch.testing.assert_close(found, (model(x) - model(start)).detach()[..., 0])


def test_the_mean_of_the_batch_and_of_data() -> None:
    model, x, data = mlp(), torch.randn(4, 6), torch.randn(50, 6)
    found = explained(model, x, "mean")["attr", "input"].sum(1)
    torch.testing.assert_close(found, (model(x) - model(x.mean(0))).detach()[:, 0])
    references = tdhook.References("mean", data=td_of(data)) if hasattr(tdhook, "References") else None
    if references is not None:
        found = explained(model, x, references)["attr", "input"].sum(1)
        torch.testing.assert_close(found, (model(x) - model(data.mean(0))).detach()[:, 0])


def test_several_are_averaged() -> None:
    model, x, data = mlp(), torch.randn(1, 6), torch.randn(5, 6)
    many = explained(model, x, td_of(data), samples=400)["attr", "input"]
    each = torch.stack([explained(model, x, row)["attr", "input"] for row in data]).mean(0)
    assert (many - each).abs().max() < 0.1 * each.abs().max()
    again = explained(model, x, td_of(data), samples=400)["attr", "input"]
    assert torch.equal(many, again)


def test_an_entry_of_the_tensordict() -> None:
    model, x, start = mlp(), torch.randn(4, 6), torch.randn(4, 6)
    td = TensorDict({"input": x, "before": start, "baseline": {"input": start}}, [4])
    for name in ("before", "baseline"):
        with LRP("deeplift", target=Target("output", 0), baseline=name).prepare(model) as run:
            found = run(td.copy())["attr", "input"].sum(1)
        torch.testing.assert_close(found, (model(x) - model(start)).detach()[:, 0])


def test_the_step_before() -> None:
    model, x = mlp(), torch.randn(2, 5, 6)
    done = torch.zeros(2, 5, 1, dtype=torch.bool)
    done[0, 2] = True
    td = TensorDict({"input": x, ("next", "done"): done}, [2, 5])
    with LRP("deeplift", target=Target("output", 0), baseline="previous").prepare(model) as run:
        found = run(td)["attr", "input"].sum(-1)
    value = model(x).detach()[..., 0]
    rise = torch.cat([torch.zeros(2, 1), value[:, 1:] - value[:, :-1]], 1)
    rise[0, 3] = 0
    torch.testing.assert_close(found, rise)


# --- What is explained ----------------------------------------------------------------------------


def keyed() -> TensorDictSequential:
    """Two keys, one of them nested, and a head that reads what they were made into."""
    return TensorDictSequential(
        TensorDictModule(nn.Linear(3, 4), [("robot", "arm")], ["left"]),
        TensorDictModule(nn.Linear(2, 4), ["eye"], ["right"]),
        TensorDictModule(lambda a, b: torch.tanh(a) * torch.sigmoid(b), ["left", "right"], ["hidden"]),
        TensorDictModule(nn.Linear(4, 3), ["hidden"], ["output"]),
    )


def keyed_td() -> TensorDict:
    return TensorDict({"robot": {"arm": torch.randn(5, 3)}, "eye": torch.randn(5, 2)}, [5])


@pytest.mark.parametrize("flow", FLOWS)
def test_nested_and_several_keys(flow: str) -> None:
    model, td, there = keyed(), keyed_td(), keyed_td()
    baseline = {("robot", "arm"): there["robot", "arm"], "eye": there["eye"]}
    with LRP("deeplift", target=Target("output", 1), baseline=baseline, flow=flow).prepare(model) as run:
        found = run(td.copy())
    total = found["attr", "robot", "arm"].sum(1) + found["attr", "eye"].sum(1)
    torch.testing.assert_close(total, (model(td.copy())["output"] - model(there)["output"]).detach()[:, 1])


@pytest.mark.parametrize("flow", FLOWS)
def test_keys_without_a_baseline_are_held_fixed(flow: str) -> None:
    model, td = keyed(), keyed_td()
    there = td.copy().set("eye", torch.zeros(5, 2))
    with LRP("deeplift", target=Target("output", 1), baseline={"eye": 0.0}, flow=flow).prepare(model) as run:
        found = run(td.copy())
    assert (found["attr", "robot", "arm"] == 0).all()
    wanted = (model(td.copy())["output"] - model(there)["output"]).detach()[:, 1]
    torch.testing.assert_close(found["attr", "eye"].sum(1), wanted)


@pytest.mark.parametrize("flow", FLOWS)
def test_all_outputs(flow: str) -> None:
    model, x, start = mlp(), torch.randn(4, 6), torch.randn(4, 6)
    td = explained(model, x, start, target=Target("output", "all"), flow=flow, ledger=True)
    wanted = (model(x) - model(start)).detach()
    torch.testing.assert_close(td["attr", "input"].sum(-1), wanted)
    assert td["ledger", "gap"].shape == wanted.shape and td["ledger", "gap"].abs().max() < 1e-12


TARGETS: dict[str, tuple[object, Callable[[Tensor, Tensor], Tensor]]] = {
    "contrast": (Contrast(Target("output", 0), Target("output", 2)), lambda z, at: z[:, 0] - z[:, 2]),
    "function": (
        Computed(lambda outputs, inputs: outputs["output"].logsumexp(-1)),
        lambda z, at: z.logsumexp(-1),
    ),
    "chosen by the input": (
        Target("output", "argmax"),
        lambda z, at: z.gather(1, at.argmax(1, True)).squeeze(1),
    ),
    "sum": (Target("output", [0, 1]), lambda z, at: z[:, 0] + z[:, 1]),
}


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("name", TARGETS)
def test_targets(name: str, flow: str) -> None:
    model, x, start = mlp(), torch.randn(4, 6), torch.randn(4, 6)
    target, value = TARGETS[name]
    found = explained(model, x, start, target=target, flow=flow, ledger=True)
    z, z0 = model(x).detach(), model(start).detach()
    wanted = value(z, z) - value(z0, z)
    relevance = found["attr", "input"]
    relevance = relevance.sum(-1) if relevance.dim() == 2 else relevance.sum((-1, -2))
    torch.testing.assert_close(relevance, wanted)
    assert found["ledger", "gap"].abs().max() < 1e-12


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("target", [Entropy(), LogProb()])
def test_targets_of_a_policy(target: object, flow: str) -> None:
    modules = pytest.importorskip("torchrl.modules")
    model = modules.ProbabilisticActor(
        TensorDictModule(mlp(), ["input"], ["logits"]),
        in_keys=["logits"],
        distribution_class=torch.distributions.Categorical,
        return_log_prob=True,
    )
    x, start = torch.randn(4, 6), torch.randn(4, 6)
    with LRP("deeplift", target=target, baseline=start, flow=flow, ledger=True).prepare(model) as run:
        found = run(td_of(x))
    log, log0 = ((model[0](td_of(value))["logits"]).detach().log_softmax(-1) for value in (x, start))
    if isinstance(target, Entropy):
        wanted = -(log.exp() * log).sum(-1) + (log0.exp() * log0).sum(-1)
    else:
        wanted = (log - log0).gather(1, found["action"].unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(found["attr", "input"].sum(1), wanted)


@pytest.mark.parametrize("flow", FLOWS)
def test_at_an_embedding(flow: str) -> None:
    model = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 5), nn.GELU(), nn.Linear(5, 3))
    ids, other = torch.randint(9, (4, 3)), torch.randint(9, (4, 3))
    method = LRP(
        "deeplift",
        target=Target("output", 0),
        baseline={"input": other},
        input_modules=["0"],
        use_inputs=False,
        flow=flow,
    )
    with method.prepare(model) as run:
        found = run(td_of(ids))
    (relevance,) = list(found["attr"].values(True, True))
    wanted = (model(ids) - model(other)).detach()[:, 0]
    torch.testing.assert_close(relevance.flatten(1).sum(1), wanted)


@pytest.mark.parametrize("flow", FLOWS)
def test_what_modules_pass_on(flow: str) -> None:
    model, x, start = mlp(), torch.randn(4, 6), torch.randn(4, 6)
    with LRP("deeplift", target=Target("output", 0), baseline=start, attribute="all", flow=flow).prepare(
        model
    ) as run:
        found = run(td_of(x))
    wanted = (model(x) - model(start)).detach()[:, 0]
    torch.testing.assert_close(found["attr", "input"].sum(1), wanted)


# --- How it is run --------------------------------------------------------------------------------


def test_outputs_are_those_of_the_model() -> None:
    model, x = mlp(), torch.randn(4, 6)
    assert torch.equal(explained(model, x, 0.0)["output"], model(x))


@pytest.mark.parametrize("flow", FLOWS)
def test_the_same_call_after_call(flow: str) -> None:
    """Kept references are those of the weights, and of the rows, at hand."""
    model, x = mlp(), torch.randn(4, 6)
    with LRP("deeplift", target=Target("output", 0), baseline=torch.ones(6), flow=flow).prepare(model) as run:
        for step in range(6):
            td = run(td_of(x[: 4 - step % 2]))
            wanted = (model(x) - model(torch.ones(6))).detach()[: 4 - step % 2, 0]
            torch.testing.assert_close(td["attr", "input"].sum(1), wanted)
            with torch.no_grad():
                if step == 1:
                    model[0].weight.mul_(1.5)
                elif step == 2:
                    model[2].bias.data.add_(0.5)
                elif step == 3:
                    model[4].weight.data = model[4].weight.data * 0.5
                    model[2].bias.data[-1] += 2.0


@pytest.mark.parametrize("flow", FLOWS)
def test_rows_of_their_own_do_not_become_one(flow: str) -> None:
    """Nor do those of a linear model, whose calls are not looked at."""
    model, x, start = nn.Linear(6, 3), torch.randn(4, 6), torch.randn(4, 6)
    with LRP("deeplift", target=Target("output", 0), baseline=start, flow=flow).prepare(model) as run:
        for _ in range(3):
            found = run(td_of(x))["attr", "input"]
            torch.testing.assert_close(found, model.weight[0].detach() * (x - start))


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize(
    "mixing",
    [
        lambda x: x - x.mean(0),
        lambda x: x + x.roll(1, 0),
        lambda x: x.softmax(0),
        lambda x: x * torch.arange(1.0, 1 + len(x)).unsqueeze(1),
        lambda x: x.sort(0)[0],
        lambda x: torch.maximum(x, x.flip(0)),
    ],
)
def test_rows_that_meet(mixing: Callable[[Tensor], Tensor], flow: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.tanh(mixing(self.first(x))))

    model, x = Model(), torch.randn(4, 6)
    with LRP("deeplift", target=Target("output", 0), baseline=0.3, flow=flow).prepare(model) as run:
        for _ in range(3):
            found = run(td_of(x))["attr", "input"].sum()
            wanted = (model(x) - model(torch.full((4, 6), 0.3))).detach()[:, 0].sum()
            torch.testing.assert_close(found, wanted)


def test_compiled() -> None:
    model, x, start = mlp(), torch.randn(4, 6), torch.randn(4, 6)
    eager = explained(model, x, start)["attr", "input"]
    with LRP(
        "deeplift", target=Target("output", 0), baseline=start, compile={"backend": "aot_eager"}
    ).prepare(model) as run:
        found = run(td_of(x))["attr", "input"]
    torch.testing.assert_close(found, eager, rtol=1e-9, atol=1e-9)


def test_in_threads() -> None:
    results: dict[int, Tensor] = {}
    model, x = mlp(), torch.randn(8, 4, 6)

    def work(i: int) -> None:
        results[i] = explained(model, x[i], float(i))["attr", "input"].sum(1)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(8):
        wanted = (model(x[i]) - model(torch.full((4, 6), float(i)))).detach()[:, 0]
        torch.testing.assert_close(results[i], wanted)


@pytest.mark.parametrize("flow", FLOWS)
def test_dropout_drops_the_same(flow: str) -> None:
    model, x, start = (
        nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.4), nn.Tanh(), nn.Linear(8, 3)),
        torch.randn(4, 6),
        0.2,
    )
    torch.manual_seed(3)
    value = model(x)
    after = torch.rand(1)
    torch.manual_seed(3)
    there = model(torch.full((4, 6), start))
    torch.manual_seed(3)
    found = explained(model, x, start, flow=flow)
    assert torch.equal(found["output"], value) and torch.equal(after, torch.rand(1))
    torch.testing.assert_close(found["attr", "input"].sum(1), (value - there).detach()[:, 0])


class Attends(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (x * factor for factor in (0.5, -1.0, 1.5))
        return F.scaled_dot_product_attention(q, k, v, dropout_p=0.4).sum(-2)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.LSTM(3, 3, num_layers=3, dropout=0.4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.cells(x)[0][:, -1]


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("make", [Attends, Recurrent])
def test_what_is_written_out_drops_the_same(make: Callable[[], nn.Module], flow: str) -> None:
    model, x, start = make(), torch.randn(4, 5, 3), torch.randn(4, 5, 3)
    torch.manual_seed(3)
    value = model(x)
    torch.manual_seed(3)
    there = model(start)
    torch.manual_seed(3)
    found = explained(model, x, start, flow=flow, ledger=True)
    torch.testing.assert_close(found["attr", "input"].sum((1, 2)), (value - there).detach()[:, 0])


@pytest.mark.parametrize("flow", FLOWS)
def test_batch_norm_in_training(flow: str) -> None:
    """Rows meet: what arrives is right of the batch. Its statistics follow the input once, and the reference never."""
    model, x, start = (
        nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)),
        torch.randn(4, 6),
        torch.randn(4, 6),
    )
    plain = nn.BatchNorm1d(8)
    plain(model[0](x))
    found = explained(model, x, start, flow=flow)
    torch.testing.assert_close(model[1].running_mean, plain.running_mean)
    assert model[1].num_batches_tracked == 1
    wanted = (model(x) - model(start)).detach()[:, 0].sum()
    torch.testing.assert_close(found["attr", "input"].sum(), wanted)


@pytest.mark.parametrize("flow", FLOWS)
def test_checkpointed_parts(flow: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = mlp(), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False))

    model, x = Model(), torch.randn(4, 6)
    found = explained(model, x, 0.1, flow=flow)["attr", "input"].sum(1)
    torch.testing.assert_close(found, (model(x) - model(torch.full((4, 6), 0.1))).detach()[:, 0])


@pytest.mark.parametrize("flow", FLOWS)
def test_overwritten_values(flow: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            h.relu_().mul_(1.5).add_(x)
            h[:, 1:3] = h[:, 3:5] * x[:, :2]
            h[:, 0] *= 2
            return self.last(h)

    model, x, start = Model(), torch.randn(4, 6), torch.randn(4, 6)
    for _ in range(2):
        found = explained(model, x, start, flow=flow)["attr", "input"].sum(1)
        torch.testing.assert_close(found, (model(x) - model(start)).detach()[:, 0])


def test_nothing_is_left_behind() -> None:
    model, x = mlp(), torch.randn(4, 6, requires_grad=True)
    unchanged = Unchanged(model)
    with LRP("deeplift", target=Target("output", 0), baseline=0.0).prepare(model) as run:
        td = run(td_of(x))
        td = run(td_of(x))
    unchanged.check()
    assert x.grad is None and td["attr", "input"].grad_fn is None and td["output"].grad_fn is None
    kept = weakref.ref(run)
    del run, td
    gc.collect()
    assert kept() is None


class Fails(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.fails = nn.Linear(6, 3), lambda x: False

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.inner(x))
        if self.fails(x.detach()):
            raise KeyboardInterrupt
        return h


@pytest.mark.parametrize("reference", [False, True])
def test_an_interrupt_leaves_the_model_whole(reference: bool) -> None:
    model, x = Fails(), torch.randn(4, 6)
    with LRP("deeplift", target=Target("output", 0), baseline=torch.zeros_like).prepare(model) as run:
        run(td_of(x))
        model.fails = lambda x: bool((x == 0).all()) == reference
        unchanged = Unchanged(model)
        with pytest.raises(KeyboardInterrupt):
            run(td_of(x))
        unchanged.check()
        model.fails = lambda x: False
        found = run(td_of(x))["attr", "input"].sum(1)
        torch.testing.assert_close(found, (model(x) - model(torch.zeros(4, 6))).detach()[:, 0])


# --- What cannot be done --------------------------------------------------------------------------


class Own(PropagationRule):
    def propagate(self, step, relevance):
        return tuple(relevance[0] for _ in step.inputs)


def test_a_rule_of_ones_own_sees_differences() -> None:
    model, x, start = nn.Sequential(nn.Tanh(), nn.Linear(6, 3)), torch.randn(4, 6), torch.randn(4, 6)
    found = explained(model, x, start, [(nn.Tanh, Own()), (nn.Linear, EpsilonRule(0.0))])
    torch.testing.assert_close(found["attr", "input"].sum(1), (model(x) - model(start)).detach()[:, 0])


def test_a_rule_mapper_has_no_differences() -> None:
    with pytest.raises(ValueError, match="needs a composite"):
        LRP(rule_mapper=lambda name, module: EpsilonRule(), baseline=0.0)


@pytest.mark.parametrize("name", ["guided_backprop", "deconvnet"])
def test_modified_gradients_have_no_differences(name: str) -> None:
    with pytest.raises((ValueError, NotImplementedError), match=r"baseline|reference|difference"):
        explained(mlp(), torch.randn(4, 6), 0.0, name)


def test_baselines_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="baseline of 'input' has shape"):
        explained(mlp(), torch.randn(4, 6), torch.zeros(5))
    with pytest.raises(KeyError, match="'nothing'"):
        explained(mlp(), torch.randn(4, 6), {"nothing": 0.0})
    with pytest.raises(KeyError, match="'unheard_of'"):
        explained(mlp(), torch.randn(4, 6), "unheard_of")
    with pytest.raises(ValueError, match="sample"):
        LRP("deeplift", baseline=0.0, samples=3)
    with pytest.raises(ValueError, match="give baseline too"):
        LRP("deeplift", samples=3)


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x).tanh() if float(x.sum()) > 0 else self.second(x).relu()


@pytest.mark.parametrize("flow", FLOWS)
def test_another_way_on_the_reference_is_told(flow: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(RuntimeError, match="something else on the reference"):
            explained(Branches(), torch.ones(4, 6), -1.0, flow=flow)


def test_presets_are_all_here() -> None:
    from tdhook.composites import PRESETS as all_presets

    others = {"guided_backprop", "deconvnet", "beta_smooth", "epsilon_gamma_box", "relp"}
    assert set(all_presets) - others <= {*PRESETS}, set(all_presets) - others - {*PRESETS}
    assert all(preset(name) for name in PRESETS)
