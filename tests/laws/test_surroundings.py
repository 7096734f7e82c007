"""Surroundings: hooks of users, modes of torch, explanations within others, and models of inference mode."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules

from tdhook import LRP, Target
from tdhook.attribution import Ablation, GradientTimesInput, IntegratedGradients
from tdhook.rules import EpsilonRule, GammaRule

FIRST = Target("output", 0)
GAMMA = [(nn.Linear, GammaRule(0.1))]


def of_linear(name: str, module: nn.Module) -> EpsilonRule | None:
    return EpsilonRule() if isinstance(module, nn.Linear) else None


METHODS = {
    "preset": lambda: LRP("epsilon_plus", target=FIRST),
    "traced": lambda: LRP("epsilon_plus_flat", target=FIRST),
    "ledger": lambda: LRP("attn_lrp", target=FIRST, ledger=True),
    "gamma": lambda: LRP(GAMMA, target=FIRST),
    "several": lambda: LRP("epsilon_plus", target=Target("output", "all")),
    "mapper": lambda: LRP(rule_mapper=of_linear, target=FIRST, warn_on_missing_rule=False),
    "gradient": lambda: GradientTimesInput(target=FIRST),
    "integrated": lambda: IntegratedGradients(target=FIRST, steps=3),
    "perturbed": lambda: Ablation(target=FIRST),
    "compiled": lambda: LRP("epsilon_plus", target=FIRST, compile={"backend": "aot_eager"}),
}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


class Gated(nn.Module):
    """A parameter and a recurrent layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.scale = nn.GRU(5, 5, batch_first=True), nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.gru(x.unsqueeze(1))[0][:, 0] * self.scale + self.scale


def network(inference: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    first = nn.Linear(4, 5)
    with torch.inference_mode(inference):
        middle = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5), nn.ReLU(), Gated(), nn.LayerNorm(5))
    return nn.Sequential(first, middle, nn.Linear(5, 2)).eval()


def explained(method: Callable[[], Any], model: nn.Module) -> TensorDict:
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    td: TensorDict = method().wrap(model)(TensorDict({"input": x}, [3]))
    return td


def assert_same(found: TensorDict, expected: TensorDict) -> None:
    assert set(found.keys(True, True)) == set(expected.keys(True, True))
    for key in expected.keys(True, True):
        assert torch.equal(found[key], expected[key]), key


@every_method
def test_backward_hooks_of_modules_are_not_given_relevance(method: Callable[[], Any]) -> None:
    model, fired = network(), []

    def changes(module: nn.Module, into: Any, out: Any) -> Any:
        fired.append(module)
        return tuple(None if grad is None else 5 * grad for grad in into)

    for module in model.modules():
        module.register_full_backward_hook(changes)
        module.register_full_backward_pre_hook(lambda module, out: fired.append(module))
    hooks = [dict(module._backward_hooks) for module in model.modules()]
    assert_same(explained(method, model), explained(method, network()))
    assert fired == [] and hooks == [dict(module._backward_hooks) for module in model.modules()]
    model(torch.randn(3, 4, requires_grad=True)).sum().backward()
    assert fired


@pytest.mark.filterwarnings("ignore:For backward hooks to be called")  # of TensorDicts, torch says
@pytest.mark.parametrize("method", [name for name in METHODS if name != "compiled"])
def test_nor_are_hooks_of_all_modules(method: str) -> None:
    fired: list[nn.Module] = []

    def changes(module: nn.Module, into: Any, out: Any) -> Any:
        fired.append(module)
        return tuple(None if grad is None else 5 * grad for grad in into)

    expected = explained(METHODS[method], network())
    handles = [
        torch_modules.register_module_full_backward_hook(changes),
        torch_modules.register_module_full_backward_pre_hook(lambda module, out: fired.append(module)),
    ]
    try:
        model = network()
        held = [set(vars(module)) for module in model.modules()]
        assert_same(explained(METHODS[method], model), expected)
        assert fired == [] and held == [set(vars(module)) for module in model.modules()]
        model(torch.randn(3, 4, requires_grad=True)).sum().backward()
        assert fired
    finally:
        for handle in handles:
            handle.remove()


class Scaled(nn.Module):
    """Scales the gradient of what it computes, as unrolled models of the world do."""

    def __init__(self, fired: list[Tensor]) -> None:
        super().__init__()
        self.net, self.fired = network(), fired

    def scaled(self, gradient: Tensor) -> Tensor:
        self.fired.append(gradient)
        return gradient / 2

    def forward(self, x: Tensor) -> Tensor:
        first, middle, last = self.net
        hidden = middle(first(x))
        if hidden.requires_grad:
            hidden.register_hook(self.scaled)
        return last(hidden)


@pytest.mark.parametrize(
    "method", [name for name in METHODS if name not in ("mapper", "gradient", "integrated")]
)
def test_hooks_of_tensors_are_not_given_relevance(method: str) -> None:
    fired: list[Tensor] = []
    model = Scaled(fired)
    assert_same(explained(METHODS[method], model), explained(METHODS[method], network()))
    assert fired == []
    model(torch.randn(3, 4, requires_grad=True)).sum().backward()
    assert len(fired) == 1


@every_method
def test_forward_hooks_that_change_values_are_a_part_of_the_model(method: Callable[[], Any]) -> None:
    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def forward(self, x: Tensor) -> Tensor:
            first, middle, last = self.net
            return last(middle(first(x + 1)) * 2)

    model = network()
    model[0].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    model[1].register_forward_hook(lambda module, args, output: output * 2)
    assert_same(explained(method, model), explained(method, Written()))


@every_method
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_modes_of_torch_change_nothing(method: Callable[[], Any], mode: Callable[[], Any]) -> None:
    expected = explained(method, network())
    with mode():
        found = explained(method, network())
    assert_same(found, expected)
    assert not found["attr", "input"].is_inference()


@every_method
def test_within_autocast_the_model_computes_as_it_does(method: Callable[[], Any]) -> None:
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        td = explained(method, network())
        assert torch.equal(td["output"], network()(td["input"]))
    torch.testing.assert_close(
        td["attr", "input"], explained(method, network())["attr", "input"], rtol=0.1, atol=0.01
    )


@every_method
def test_an_explanation_within_an_explanation(method: Callable[[], Any]) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(2)
            self.linear, self.inner = nn.Linear(4, 2), METHODS["preset"]().wrap(network())

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x * self.inner(TensorDict({"input": x}, [len(x)]))["attr", "input"])

    td = explained(method, Outer())
    assert torch.equal(td["output"], Outer()(td["input"]))


@every_method
def test_parameters_of_inference_mode(method: Callable[[], Any]) -> None:
    model = network(inference=True)
    held = {name: (id(p), p.requires_grad, p.is_inference()) for name, p in model.named_parameters()}
    assert_same(explained(method, model), explained(method, network()))
    assert held == {name: (id(p), p.requires_grad, p.is_inference()) for name, p in model.named_parameters()}


def test_buffers_of_inference_mode_are_updated_in_place() -> None:
    models = [network(inference).train() for inference in (True, False)]
    norm = models[0][1][1]
    mean = norm.running_mean
    for _ in range(2):
        assert_same(*(explained(METHODS["preset"], model) for model in models))
    assert norm.running_mean is mean and mean.is_inference()
    assert torch.equal(mean, models[1][1][1].running_mean)


def test_a_state_of_inference_mode() -> None:
    class Stateful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.cell, self.head, self.h = nn.GRUCell(4, 3), nn.Linear(3, 2), None

        def forward(self, x: Tensor) -> Tensor:
            self.h = self.cell(x, self.h)
            return self.head(self.h)

    model = Stateful()
    plain = copy.deepcopy(model)
    with torch.inference_mode():
        model(torch.ones(3, 4))
    plain(torch.ones(3, 4))
    td = explained(METHODS["preset"], model)
    torch.testing.assert_close(td["output"], plain(td["input"]))
    assert not model.h.requires_grad
