"""Several references at once: the mean of what each of them gives alone, whatever the model does with its batch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from tdhook import LRP, Contrast, References, Target
from tdhook.attribution.averaged import Averaged
from tdhook.perturbing.draws import Noise
from tdhook.relevance.propagation.formula import PropagationRule
from tdhook.relevance.propagation.steps import Grads, Step
from tdhook.rules import EpsilonRule
from tdhook.selectors import Type
from tdhook.targets import Through

COUNT = 12
TARGET = Target("output", 1)


def mlp(features: int = 5, outputs: int = 3) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(features, 16), nn.ReLU(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, outputs)
    )


class Coupled(nn.Module):
    """Two layers, between which the elements of a batch meet."""

    def __init__(self, meet: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.meet, self.last = nn.Linear(5, 8), meet, nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.meet(self.first(x)))


class Agents(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = mlp(5, 4), mlp(7, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.last(torch.cat([self.first(x), y], -1))


@pytest.fixture(autouse=True)
def _double() -> None:
    torch.manual_seed(0)


def counted() -> tuple[nn.Module, list[int]]:
    """A model, and how many rows each of its runs had."""
    rows: list[int] = []

    class Noted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            rows.append(len(x))
            return x

    return nn.Sequential(Noted(), mlp()).double(), rows


def rows_of(*shape: int) -> TensorDict:
    return TensorDict({"input": torch.randn(*shape, 5).double()}, shape)


def references(**options) -> References:
    return References("sample", COUNT, rows_of(40), **options)


def each(method: LRP, over: References, model: nn.Module, td: TensorDict, *names: str) -> TensorDict:
    """Relevance against each reference alone, ``[references, ...]``."""
    single = [
        method.against(over.only(number)).wrap(model, *names)(td.clone()) for number in range(over.samples)
    ]
    return torch.stack([one["attr"] for one in single])


@pytest.mark.parametrize("preset", ["epsilon_plus", "deeplift", "deeplift_shapley", "attn_lrp"])
@pytest.mark.parametrize("flow", ["relevance", "gradient"])
@pytest.mark.parametrize("shape", [(), (1,), (2, 3)])
def test_mean_and_spread_are_those_of_each(preset, flow, shape):
    net, td, over = mlp().double(), rows_of(*shape), references(spread=True)
    method = LRP(preset, target=TARGET, flow=flow, baseline=over)
    found, alone = method.wrap(net)(td.clone()), each(method, over, net, td)["input"]
    torch.testing.assert_close(found["attr", "input"], alone.mean(0))
    torch.testing.assert_close(found["spread", "input"], alone.std(0))
    torch.testing.assert_close(found["output"], net(td["input"]))


@pytest.mark.parametrize(
    "target",
    [
        Target("output", "all"),
        Contrast(TARGET, Target("output", 0)),
        Through(TARGET, "2", "all"),
        Through(Target("output", "argmax"), "0", (1, 3)),
    ],
    ids=repr,
)
def test_targets(target):
    net, td, over = mlp().double(), rows_of(4), references()
    method = LRP("deeplift", target=target, baseline=over)
    torch.testing.assert_close(
        method.wrap(net)(td.clone())["attr", "input"], each(method, over, net, td)["input"].mean(0)
    )


def test_that_they_run_at_once():
    (net, rows), td = counted(), rows_of(2)
    explained = LRP("deeplift", target=TARGET, baseline=references()).wrap(net)
    explained(td.clone())
    rows.clear()
    explained(td.clone())
    assert len(rows) < COUNT
    assert max(rows) >= 2 * COUNT


@pytest.mark.parametrize("options", [{"memory_budget": 1}, {"ledger": True}], ids=str)
def test_those_that_run_one_after_the_other(options):
    (net, rows), td, over = counted(), rows_of(2), references()
    method = LRP("deeplift", target=TARGET, baseline=over)
    found = LRP("deeplift", target=TARGET, baseline=over, **options).wrap(net)(td.clone())
    assert set(rows) == {2}
    torch.testing.assert_close(found["attr", "input"], each(method, over, net, td)["input"].mean(0))


@pytest.mark.parametrize("shape", [(), (4,), (2, 3)])
@pytest.mark.parametrize(
    "given",
    [
        "sample",
        {("agents", "x"): "sample"},
        {("agents", "x"): "sample", "y": "mean"},
        {"y": "sample", ("agents", "x"): 0.5},
    ],
    ids=str,
)
def test_several_keys_nested_ones_and_those_held_fixed(shape, given):
    model = TensorDictModule(Agents().double(), [("agents", "x"), "y"], ["output"])
    td, data = (
        TensorDict(
            {"agents": {"x": torch.randn(*size, 5).double()}, "y": torch.randn(*size, 3).double()}, size
        )
        for size in (shape, (30,))
    )
    over = References(given, COUNT, data)
    method = LRP("deeplift", target=TARGET, baseline=over)
    found, alone = method.wrap(model)(td.clone())["attr"], each(method, over, model, td).mean(0)
    for key in (("agents", "x"), "y"):
        torch.testing.assert_close(found[key], alone[key])


@pytest.mark.parametrize("attribute", ["x", "y"])
def test_what_is_not_attributed_may_be_compared_too(attribute):
    model = TensorDictModule(Agents().double(), ["x", "y"], ["output"])
    td, data = (
        TensorDict({"x": torch.randn(n, 5).double(), "y": torch.randn(n, 3).double()}, [n]) for n in (4, 30)
    )
    over = References({"x": "sample", "y": "sample"}, COUNT, data)
    method = LRP("deeplift", target=TARGET, baseline=over, attribute=(attribute,))
    found, alone = method.wrap(model)(td.clone())["attr"], each(method, over, model, td).mean(0)
    torch.testing.assert_close(found[attribute], alone[attribute])


class ByMean(PropagationRule):
    """Shares by a mean over all outputs."""

    needs_outputs = needs_vjp = True

    def propagate(self, step: Step, relevance: tuple[Tensor, ...]) -> Grads:
        z = step.outputs[0]
        (grad,) = step.vjp(relevance[0] * z / (z.square() + 0.1 * z.square().mean()))
        return (step.inputs[0] * grad,)


@pytest.mark.parametrize("flow", ["relevance", "gradient"])
@pytest.mark.parametrize(
    "rule",
    [EpsilonRule(lambda z: z + z.sign() * 0.25 * z.square().mean().sqrt()), ByMean()],
    ids=["mean", "own"],
)
def test_rules_that_look_at_all_rows_see_one_reference(rule, flow):
    net, td, over = mlp().double(), rows_of(4), references(spread=True)
    method = LRP([(Type(nn.Linear), rule)], target=TARGET, flow=flow, baseline=over)
    found, alone = method.wrap(net)(td.clone()), each(method, over, net, td)["input"]
    torch.testing.assert_close(found["attr", "input"], alone.mean(0))
    torch.testing.assert_close(found["spread", "input"], alone.std(0))
    one, other = (
        Averaged(
            LRP([(Type(nn.Linear), rule)], target=TARGET, flow=flow, memory_budget=budget),
            Noise(0.1, samples=6),
        )
        for budget in (None, 1)
    )
    torch.testing.assert_close(one.wrap(net)(td.clone())["attr"], other.wrap(net)(td.clone())["attr"])


@pytest.mark.parametrize(
    "meet",
    [
        lambda h: (h - h.mean(0, keepdim=True)).relu(),
        lambda h: h * (h > h.median(0, keepdim=True).values),
        lambda h: h / h.abs().max(),
        lambda h: h.relu() * len(h),
        lambda h: nn.functional.batch_norm(h, None, None, training=True),
    ],
    ids=["mean", "median", "largest", "count", "batch_norm"],
)
def test_elements_that_meet_do_not_meet_other_references(meet):
    net, td, over = Coupled(meet).double(), rows_of(4), references()
    method = LRP("deeplift", target=TARGET, baseline=over)
    torch.testing.assert_close(
        method.wrap(net)(td.clone())["attr", "input"], each(method, over, net, td)["input"].mean(0)
    )


def test_a_model_that_counts_its_calls_counts_one():
    net = mlp().double()

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net
            self.register_buffer("calls", torch.zeros(()).double())

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.net(x) * self.calls

    counting, td, over = Counting(), rows_of(3), references()
    explained = LRP("deeplift", target=TARGET, baseline=over).wrap(counting)
    alone = each(LRP("deeplift", target=TARGET), over, net, td)["input"].mean(0)
    for calls in (1, 2, 3):
        found = explained(td.clone())
        assert counting.calls == calls
        torch.testing.assert_close(found["attr", "input"], calls * alone)


@pytest.mark.parametrize("of", ["mean", "squares", "variance"])
def test_averaged_over_them(of):
    net, td, over = mlp().double(), rows_of(4), references()
    method = LRP("deeplift", target=TARGET, baseline=0.0)
    alone = each(method, over, net, td)["input"]
    expected = {"mean": alone.mean(0), "squares": alone.square().mean(0), "variance": alone.var(0)}[of]
    found = Averaged(method, over, of=of).wrap(net)(td.clone())
    torch.testing.assert_close(found["attr", "input"], expected)


@pytest.mark.slow
def test_compiled_equals_eager():
    net, td, over = mlp().double(), rows_of(4), references(spread=True)
    eager = LRP("deeplift", target=TARGET, baseline=over).wrap(net)(td.clone())
    found = LRP("deeplift", target=TARGET, baseline=over, compile=True).wrap(net)(td.clone())
    for name in ("attr", "spread"):
        torch.testing.assert_close(found[name, "input"], eager[name, "input"])


def test_one_of_them_is_drawn_by_its_number_among_others_too() -> None:
    data = TensorDict({"input": torch.randn(50, 5)}, [50])
    td = TensorDict({"input": torch.randn(4, 5)}, [4])
    over, values, dims = References("sample", COUNT, data), {"input": td["input"]}, {"input": 1}
    every = over.several(range(COUNT), values, dims, td)["input"]
    (alone,) = over.only(3).of(values, dims, td)
    assert torch.equal(every[3], alone.replaced["input"])
    assert torch.equal(over.only(3).several(range(1), values, dims, td)["input"][0], every[3])
