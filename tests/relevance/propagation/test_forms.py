"""Closed forms are those of the layer as it is when it is called."""

from __future__ import annotations

import torch
from tensordict import TensorDict
from torch import nn

from tdhook import LRP, Target
from tdhook.relevance.propagation.forms import closed_form
from tdhook.rules import EpsilonRule


def test_settings_of_a_convolution_that_change_after_it_was_wrapped() -> None:
    tail = (nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 2))
    net = nn.Sequential(nn.Conv2d(2, 3, 3, stride=1, padding=1), *tail).double()
    td = TensorDict({"input": torch.randn(4, 2, 6, 6).double()}, [4])
    explained = LRP("epsilon", target=Target("output", 0)).wrap(net)
    explained(td.clone())
    net[0].stride = (2, 2)
    fresh = LRP("epsilon", target=Target("output", 0)).wrap(net)(td.clone())
    torch.testing.assert_close(explained(td.clone())["attr", "input"], fresh["attr", "input"])


def test_settings_that_change_under_a_registered_rule() -> None:
    layer = nn.Conv1d(2, 3, 3).double()
    x = torch.randn(4, 2, 9).double().requires_grad_()
    with EpsilonRule().register(layer):
        layer(x)
        layer.padding = (1,)
        (found,) = torch.autograd.grad(layer(x).sum(), x)
    again = nn.Conv1d(2, 3, 3, padding=1).double()
    again.load_state_dict(layer.state_dict())
    with EpsilonRule().register(again):
        (expected,) = torch.autograd.grad(again(x).sum(), x)
    torch.testing.assert_close(found, expected)


def test_a_layer_that_computes_in_its_own_way_has_none() -> None:
    class Own(nn.Linear):
        def forward(self, input):
            return super().forward(input) * 2

    assert closed_form(Own(2, 2)) is None and closed_form(nn.Linear(2, 2)) is not None
