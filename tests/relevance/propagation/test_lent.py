"""Layers that have their weights only while they run, as where these are offloaded."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from tdhook import LRP, Target
from tdhook.rules import AlphaBetaRule, EpsilonRule, FlatRule, GammaRule, WSquareRule, ZBoxRule, ZPlusRule
from tdhook.selectors import Type


def offload(layer: nn.Module) -> None:
    """Put parameters away, and bring them back for each call, in a forward pass that takes the place of its own."""
    away = {name: value.detach().clone() for name, value in layer.named_parameters(recurse=False)}
    kept = {name: value.clone() for name, value in layer.named_buffers(recurse=False)}
    own = layer.forward

    def put_away() -> None:
        for name, value in away.items():
            setattr(layer, name, nn.Parameter(value.to("meta"), requires_grad=False))
        for name, value in kept.items():
            setattr(layer, name, value.to("meta"))

    def forward(*args: Tensor, **kwargs: Tensor) -> Tensor:
        for name, value in away.items():
            setattr(layer, name, nn.Parameter(value.clone(), requires_grad=False))
        for name, value in kept.items():
            setattr(layer, name, value.clone())
        result = own(*args, **kwargs)
        put_away()
        return result

    layer.forward = forward  # type: ignore[method-assign]
    put_away()


def network() -> nn.Module:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Flatten(), nn.Linear(48, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 2))
    padded = nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular")
    return nn.Sequential(nn.Conv2d(1, 2, 2), nn.ReLU(), padded, *dense).double()


def batch() -> TensorDict:
    torch.manual_seed(1)
    return TensorDict({"input": torch.randn(3, 1, 5, 5, dtype=torch.float64)}, [3])


RULES = [
    EpsilonRule(1e-2),
    EpsilonRule(1e-2, zero_params="bias"),
    GammaRule(),
    ZPlusRule(),
    AlphaBetaRule(),
    FlatRule(),
    WSquareRule(),
    ZBoxRule(-3.0, 3.0),
]


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("ledger", [False, True])
@pytest.mark.parametrize("outputs", [0, [0, 1]])
def test_they_are_ruled_with_the_weights_that_they_compute_with(rule, ledger, outputs):
    if isinstance(rule, FlatRule):
        rule = FlatRule(1e-2)
    method = LRP([(Type("_ConvNd", nn.Linear), rule)], target=Target("output", outputs), ledger=ledger)
    expected = method.wrap(network())(batch())
    net = network()
    for layer in net:
        offload(layer)
    explained = method.wrap(net)
    for _ in range(2):
        found = explained(batch())
        for key, value in expected.items(True, True):
            torch.testing.assert_close(found[key], value, rtol=0, atol=1e-9)
    assert all(parameter.is_meta for parameter in net.parameters())


def test_what_cannot_be_ruled_is_refused_by_name():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv1d(1, 2, 1), nn.BatchNorm1d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2)
    ).eval()
    offload(net[1])
    td = TensorDict({"input": torch.randn(3, 1, 4)}, [3])
    with pytest.raises(
        NotImplementedError, match="BatchNorm1d is merged .* offloaded.*merge_batch_norm=False"
    ):
        LRP("epsilon_plus", target="output").wrap(net)(td)
    assert (
        LRP("epsilon_plus", target="output", merge_batch_norm=False)
        .wrap(net)(td)["attr", "input"]
        .isfinite()
        .all()
    )

    class Twice(nn.Linear):
        """Computes with two weights, neither of which is its own as it was."""

    layer = Twice(4, 2)
    offload(layer)
    inner = layer.forward
    layer.forward = lambda x: inner(x) + inner(-x) * 0  # type: ignore[method-assign]
    with pytest.raises(
        NotImplementedError, match="the weight of Twice is offloaded, and it is not seen to compute"
    ):
        LRP([(nn.Linear, ZPlusRule())], target="output").wrap(layer)(
            TensorDict({"input": torch.randn(3, 4)}, [3])
        )


def test_other_modules_whose_parameters_a_rule_modifies_are_refused():
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight

    scale = Scale()
    offload(scale)
    with pytest.raises(
        NotImplementedError, match="modifies parameters of Scale, which are offloaded and only lent"
    ):
        LRP([(Scale, ZPlusRule())], target="output").wrap(scale)(
            TensorDict({"input": torch.randn(3, 4)}, [3])
        )
