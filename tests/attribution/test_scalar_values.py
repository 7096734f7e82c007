"""Inputs of one number for each element, with and without a batch: as those that have an axis of size one for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from tdhook import LRP, References, Target
from tdhook.attribution import (
    Ablation,
    Averaged,
    BiLRP,
    Conductance,
    ExpectedGradients,
    GradientTimesInput,
    IntegratedGradients,
    KernelShap,
    Noise,
    Patching,
    PredDiff,
    Shapley,
    ShapleyInteraction,
    ShapleySampling,
)
from tdhook.evaluation import (
    complexity,
    infidelity,
    insertion_deletion,
    localisation,
    perturbation_curve,
    sensitivity,
    sensitivity_n,
)
from tdhook.rl import Explain

METHODS: dict[str, Any] = {
    "gradient x input": GradientTimesInput,
    "integrated": lambda target: IntegratedGradients(target, steps=3, ledger=True),
    "expected": lambda target: ExpectedGradients(target, baseline=References(0.1), samples=1),
    "conductance": lambda target: Conductance(target, steps=3),
    "smooth": lambda target: Averaged(GradientTimesInput(target), Noise(0.1, 3, relative=True), spread=True),
    "lrp": lambda target: LRP("epsilon", target=target, values=True, ledger=True),
    "deeplift": lambda target: LRP("deeplift", target=target, baseline=0.1, ledger=True),
    "ablation": Ablation,
    "shapley": lambda target: Shapley(target, ledger=True),
    "whole": lambda target: Shapley(target, features="whole"),
    "kernel": KernelShap,
    "sampling": lambda target: ShapleySampling(target, permutations=4, errors=True),
    "interaction": ShapleyInteraction,
    "pairs": lambda target: PredDiff(target, baseline=0.0),
}
BATCHES = pytest.mark.parametrize("batch", [(), (3,), (2, 2)], ids=str)


class Net(nn.Module):
    """Two numbers, as they are or each in an axis of its own, and a vector."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        if x.dim() < z.dim():
            x, y = x.unsqueeze(-1), y.unsqueeze(-1)
        return self.last(torch.tanh(self.first(torch.cat([x, y, z], -1))))


def model() -> TensorDictModule:
    return TensorDictModule(Net().double(), ["x", "y", "z"], ["q"])


def numbers(*batch: int) -> TensorDict:
    torch.manual_seed(1)
    return TensorDict(
        {
            "x": torch.randn(batch).double(),
            "y": torch.randn(batch).double(),
            "z": torch.randn(*batch, 2).double(),
        },
        batch,
    )


def in_axes(td: TensorDict) -> TensorDict:
    wide = td.clone()
    for key in ("x", "y"):
        wide.set(key, td.get(key).unsqueeze(-1))
    return wide


@BATCHES
@pytest.mark.parametrize("target", [Target("q", 1), Target("q", "all")], ids=["one", "all"])
@pytest.mark.parametrize("name", METHODS)
def test_relevance_is_that_of_values_in_an_axis(name: str, target: Target, batch: tuple[int, ...]) -> None:
    method, net, td = METHODS[name](target), model(), numbers(*batch)
    found, wanted = method.wrap(net)(td.clone()), method.wrap(net)(in_axes(td))
    for key, value in wanted.exclude("x", "y", "z").items(True, True):
        torch.testing.assert_close(found.get(key), value.reshape(found.get(key).shape))
    lead = () if target.index == 1 else (3,)
    assert found["attr", "x"].shape == (*batch, *lead) and found["attr", "z"].shape == (*batch, *lead, 2)
    again = Explain(method, net, under="again")(td.clone())["again"]
    torch.testing.assert_close(again["attr", "x"], found["attr", "x"])


@BATCHES
@pytest.mark.parametrize("by", ["exact", "atp", "by_share", "eap_ig"])
def test_effects_of_numbers_and_of_whole_layers(by: str, batch: tuple[int, ...]) -> None:
    net, td = model(), numbers(*batch)
    other = td.apply(lambda x: 2 * x + 1)
    both, wide = TensorDict({}, batch), TensorDict({}, batch)
    for side, one in (("clean", td), ("corrupt", other)):
        both[side], wide[side] = one, in_axes(one)
    patching = Patching(by, Target("q", 0), at=["x", "y", "module.first"], axis=())
    found, wanted = patching.wrap(net)(both), patching.wrap(net)(wide)
    for place in ("x", "y", "module.first"):
        assert found["attr", place].shape == batch
        torch.testing.assert_close(found["attr", place], wanted["attr", place])


@BATCHES
def test_pairs_of_numbers(batch: tuple[int, ...]) -> None:
    found = BiLRP(GradientTimesInput(), "q").wrap(model())(numbers(*batch))["pairs"]
    assert found["x", "y"].shape == batch and found["x", "z"].shape == (*batch, 2)


@BATCHES
def test_measures_of_numbers(batch: tuple[int, ...]) -> None:
    net, td = model(), numbers(*batch)
    method = GradientTimesInput(Target("q", "argmax"))
    for measure in (perturbation_curve, insertion_deletion, sensitivity_n, infidelity, sensitivity):
        found, wanted = measure(net, td, method), measure(net, in_axes(td), method)
        for name, value in found.figures().items():
            torch.testing.assert_close(value, wanted.figures()[name])
    explained = method.wrap(net)(td.clone())
    assert complexity(explained).features == 4
    masks = {"x": torch.tensor(True), "y": torch.tensor(False), "z": torch.tensor([False, True])}
    assert localisation(explained, masks).pointing.shape == batch
