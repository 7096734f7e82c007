"""A batch norm of what something else reads, too: there is no one layer that it and the one before it amount to."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from tdhook import LRP, Target
from tdhook.models.families import Linear
from tdhook.rules import AlphaBetaRule, EpsilonRule, FlatRule, GammaRule, WSquareRule, ZBoxRule, ZPlusRule

RULES = [
    EpsilonRule(0.1), EpsilonRule(0.0), ZPlusRule(), AlphaBetaRule(), GammaRule(), WSquareRule(), FlatRule(),
    ZBoxRule(-4.0, 4.0),
]  # fmt: skip


class Shared(nn.Module):
    """One layer, two batch norms, and what is made of them.

    Args:
        read: ``(model, x, z)``, given what the layer returns, to what the last one is given.
        calls: how often the layer is called: once, or once for each that reads what it returns.
    """

    def __init__(self, read: Callable[[Shared, Tensor, Callable[[], Tensor]], Tensor], calls: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.inner, self.last = nn.Linear(5, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.norm, self.other = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
        self.read, self.calls = read, calls
        for norm in (self.norm, self.other):
            for values in (norm.running_mean, norm.weight, norm.bias):
                nn.init.normal_(values)
            nn.init.uniform_(norm.running_var, 0.5, 2.0)

    def forward(self, x: Tensor) -> Tensor:
        z = self.first(x)
        return self.last(self.read(self, x, (lambda: z) if self.calls == 1 else lambda: self.first(x)))


READ = {
    "around it": lambda model, x, z: model.inner(model.norm(z()).relu()) + z(),
    "around it, first": lambda model, x, z: 2.0 * z() + model.inner(model.norm(z()).relu()),
    "around it, moved": lambda model, x, z: (
        (y := z()[:, :, None].transpose(1, 2).flatten(1)) + model.norm(y).relu()
    ),
    "by another one": lambda model, x, z: model.norm(z()).relu() + model.other(z()).relu(),
}
MERGED = {
    "by it alone": lambda model, x, z: model.norm(z()).relu(),
    "by it, moved": lambda model, x, z: model.norm(z()[:, :, None].squeeze(-1)).relu(),
    "by it twice": lambda model, x, z: model.norm(z()).relu() + model.norm(z()).sigmoid(),
    "by both, of a call each": lambda model, x, z: (
        model.norm(z()).relu() + model.other(model.first(-x)).relu()
    ),
}


def explain(model: nn.Module, rules: object, **options: object) -> TensorDict:
    model = model.double().eval()
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).double()
    with LRP(rules, target=Target("output", 1), **options).prepare(model) as explained:
        td = explained(TensorDict({"input": x}, [6]))
    assert torch.equal(td["output"], model(x))
    return td


@pytest.mark.parametrize("flow", ["relevance", "gradient"])
@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("name", READ)
def test_it_is_a_weighted_sum(name: str, rule: object, flow: str) -> None:
    model = Shared(READ[name], 1)
    td = explain(model, [(Linear, rule)], flow=flow, ledger=True)
    expected = explain(model, [(Linear, rule), (nn.BatchNorm1d, EpsilonRule(0.0))], flow=flow)
    torch.testing.assert_close(td["attr", "input"], expected["attr", "input"])
    if not isinstance(rule, WSquareRule | FlatRule | ZBoxRule):  # which may give relevance to what is zero
        assert td["ledger", "gap"].abs().max() < 1e-9


@pytest.mark.parametrize("flow", ["relevance", "gradient"])
@pytest.mark.parametrize("name", ["around it", "around it, first", "by another one"])
def test_under_epsilon_that_is_the_layer_called_once_for_each(name: str, flow: str) -> None:
    once, each = (
        explain(Shared(READ[name], calls), [(Linear, EpsilonRule(0.0))], flow=flow) for calls in (1, 2)
    )
    torch.testing.assert_close(once["attr", "input"], each["attr", "input"])


@pytest.mark.parametrize("flow", ["relevance", "gradient"])
@pytest.mark.parametrize("rule", RULES[2:], ids=repr)
@pytest.mark.parametrize("name", READ)
def test_against_a_baseline_it_scales_differences(name: str, rule: object, flow: str) -> None:
    td = explain(Shared(READ[name], 1), [(Linear, rule)], flow=flow, baseline=0.5)
    apart = explain(Shared(READ[name], 1), [(Linear, rule)], flow=flow, baseline=0.5, merge_batch_norm=False)
    torch.testing.assert_close(td["attr", "input"], apart["attr", "input"])


def merged(layer: nn.Linear, norm: nn.BatchNorm1d) -> nn.Linear:
    """The one layer that both amount to."""
    one, scale = copy.deepcopy(layer), norm.weight / (norm.running_var + norm.eps).sqrt()
    with torch.no_grad():
        one.weight.mul_(scale[:, None])
        one.bias.copy_((layer.bias - norm.running_mean) * scale + norm.bias)
    return one


class Merged(nn.Module):
    """:class:`Shared` with layers that are merged by hand, of which each is called."""

    def __init__(self, model: Shared) -> None:
        super().__init__()
        model = copy.deepcopy(model).double()
        self.one, self.two = merged(model.first, model.norm), merged(model.first, model.other)
        self.last, self.read = model.last, model.read

    def forward(self, x: Tensor) -> Tensor:
        # What stands for the layer hands on what it is given.
        self.first, self.norm, self.other = (lambda y: y), self.one, self.two
        return self.last(self.read(self, x, lambda: x))


@pytest.mark.parametrize("baseline", [None, 0.5])
@pytest.mark.parametrize("flow", ["relevance", "gradient"])
@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("name", MERGED)
def test_where_nothing_else_reads_it_is_merged(
    name: str, rule: object, flow: str, baseline: float | None
) -> None:
    model = Shared(MERGED[name], 1)
    options = {"flow": flow, "baseline": baseline}
    found, expected = (
        explain(each, [(Linear, rule)], **options)["attr", "input"] for each in (model, Merged(model))
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("compile", [False, {"backend": "aot_eager"}], ids=["eager", "compiled"])
def test_the_model_runs_as_in_one_call(compile: object) -> None:
    """It is known after the first run, which is made again; what the model holds is that of one."""
    model = Shared(READ["around it"], 1)
    model.register_buffer("count", torch.zeros(()))
    model = model.double().eval()

    def counted(*_: object) -> None:
        model.count += 1

    model.first.register_forward_pre_hook(counted)
    method = LRP([(Linear, ZPlusRule())], target=Target("output", 1), compile=compile)
    expected = explain(Shared(READ["around it"], 1), [(Linear, ZPlusRule())])["attr", "input"]
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).double()
    explained = method.wrap(model)
    for count in (1, 2, 3):
        td = explained(TensorDict({"input": x}, [6]))
        torch.testing.assert_close(td["attr", "input"], expected)
        assert model.count == count
