"""Weights of one model, copied into another like it, in whichever form they are sent."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from tdhook.models.loading import Weights, load_weights


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    net[1].running_mean.uniform_()
    net.register_buffer("scratch", torch.rand(2), persistent=False)
    return net


FORMS: dict[str, Callable[[nn.Module], Weights]] = {
    "module": lambda net: net,
    "wrapped": nn.DataParallel,
    "state dict": lambda net: net.state_dict(),
    "state dict of a wrapped one": lambda net: nn.DataParallel(net).state_dict(),
    "state dict of a compiled one": lambda net: torch.compile(net, backend="eager").state_dict(),
    "TensorDict": TensorDict.from_module,
    "TensorDict as a module": lambda net: TensorDict.from_module(net, as_module=True),
}


@pytest.mark.parametrize("form", FORMS)
def test_all_forms(form: str) -> None:
    ours, theirs = network(0), network(1)
    load_weights(ours, FORMS[form](theirs))
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value)
    assert all(p.requires_grad and p.is_leaf for p in ours.parameters())


def test_others_are_refused_and_nothing_is_copied() -> None:
    ours = network(0)
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    state = network(1).state_dict()
    for wrong, names in (
        ({**state, "0.weight": torch.ones(1)}, "0.weight is"),
        ({**state, "9.weight": torch.ones(1), "0.bias": torch.ones(1)}, "9.weight, 0.bias are"),
        ({name: value for name, value in state.items() if name != "2.bias"}, "2.bias is"),
    ):
        with pytest.raises(
            ValueError, match=f"do not fit a Sequential: {names} missing, too many, or of another"
        ):
            load_weights(ours, wrong)
    assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())
