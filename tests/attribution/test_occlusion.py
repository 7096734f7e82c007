"""Occlusion and ablation: what is lost without a window, or a feature, written out."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from tdhook import Target
from tdhook.attribution import Ablation, Occlusion
from tdhook.perturbing.features import patches
from tdhook.targets import AtStep


def picture_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(3 * 7 * 6, 4), nn.Tanh()
    ).double()


def pictures(*batch: int) -> TensorDict:
    torch.manual_seed(1)
    return TensorDict({"input": torch.randn(*batch, 2, 9, 8).double()}, list(batch))


def by_hand(net, x: Tensor, output: int, window: tuple[int, int], strides: tuple[int, int]) -> Tensor:
    total, covered = torch.zeros_like(x), torch.zeros_like(x)
    for top in range(0, 9, strides[0]):
        for left in range(0, 8, strides[1]):
            mask = torch.zeros_like(x)
            mask[..., top : top + window[0], left : left + window[1]] = 1
            lost = (net(x) - net(x * (1 - mask)))[:, output]
            total += mask * lost.reshape(-1, 1, 1, 1) / mask[0].sum()
            covered += mask
            if left + window[1] >= 8:
                break
        if top + window[0] >= 9:
            break
    return total / covered


@given(
    window=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    share=st.tuples(st.floats(0.1, 1), st.floats(0.1, 1)),
)
@settings(max_examples=20, deadline=None)
def test_windows(window, share) -> None:
    strides = tuple(max(1, int(size * part)) for size, part in zip(window, share, strict=True))
    net, td = picture_net(), pictures(3)
    with torch.no_grad():
        expected = by_hand(net, td["input"], 2, window, strides)
    found = Occlusion(Target("output", 2), window=window, strides=strides).wrap(net)(td)["attr", "input"]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("batch", [(), (1,), (5,), (2, 3)])
@pytest.mark.parametrize("index", [1, "all"])
def test_windows_side_by_side_are_patches(batch, index) -> None:
    net, td = picture_net(), pictures(*batch)
    if not batch:
        net = nn.Sequential(nn.Unflatten(0, (1, 2)), *net, nn.Flatten(0))
    windows = Occlusion(Target("output", index), window=(3, 4), baseline=0.3).wrap(net)(td.clone())
    features = patches((2, 9, 8), (3, 4))
    groups = Ablation(Target("output", index), features=features, baseline=0.3).wrap(net)(td.clone())
    torch.testing.assert_close(windows["attr", "input"], groups["attr", "input"])
    several = (4,) if index == "all" else ()
    assert windows["attr", "input"].shape == (*batch, *several, 2, 9, 8)


def test_single_entries_lose_what_they_are_worth() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)).double(), torch.randn(4, 6).double()
    baseline = torch.linspace(0, 1, 6).double()
    expected = torch.stack(
        [(net(x) - net(torch.where(torch.arange(6) == i, baseline, x)))[:, 1] for i in range(6)], -1
    )
    td = TensorDict({"input": x}, [4])
    for method in (Ablation, Occlusion):
        options = {"window": 1} if method is Occlusion else {}
        found = method(Target("output", 1), baseline=baseline, **options).wrap(net)(td.clone())
        torch.testing.assert_close(found["attr", "input"], expected)


class Frames(nn.Module):
    """Sums up what it has seen, ``[*batch, time, 1, height, width]``, with weights."""

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.arange(x[0, 0].numel()).double().reshape(x.shape[2:])
        return (x * weight).flatten(2).sum(-1, keepdim=True).cumsum(1).square()


def test_windows_of_each_step_of_a_sequence() -> None:
    td = TensorDict({"input": torch.randn(2, 3, 1, 4, 4).double()}, [2, 3])
    found = Occlusion(AtStep(Target("output", 0), 1), window=(2, 2)).wrap(Frames())(td.clone())
    x, net = td["input"], Frames()
    changed = x.clone()
    changed[:, 0, :, 2:, :2] = 0
    lost = (net(x) - net(changed))[:, 1, 0]
    torch.testing.assert_close(found["attr", "input"][:, 0, 0, 3, 1], lost / 4)
    assert not found["attr", "input"][:, 2].any()


def test_windows_by_key() -> None:
    class Both(nn.Module):
        def forward(self, image: Tensor, vector: Tensor) -> Tensor:
            return (image.flatten(1).sum(-1) * vector.sum(-1)).unsqueeze(-1)

    module = TensorDictModule(Both(), ["image", "vector"], ["output"])
    td = TensorDict({"image": torch.rand(3, 1, 4, 4), "vector": torch.rand(3, 2)}, [3])
    found = Occlusion(window={"image": (2, 2), "vector": 1}).wrap(module)(td.clone())
    share = td["image"].unfold(2, 2, 2).unfold(3, 2, 2).sum((-1, -2)) * td["vector"].sum(-1).view(3, 1, 1, 1)
    torch.testing.assert_close(found["attr", "image"][:, :, ::2, ::2], share / 4)
    torch.testing.assert_close(
        found["attr", "vector"], td["vector"] * td["image"].sum((1, 2, 3)).unsqueeze(-1)
    )
    with pytest.raises(KeyError, match="windows are given by key, and 'vector' has none"):
        Occlusion(window={"image": (2, 2)}).wrap(module)(td.clone())


class Overwriting(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(2).sum(-1, keepdim=True).square()


def test_a_model_that_overwrites_its_input() -> None:
    x = torch.randn(5, 3).double()
    td = TensorDict({"input": x.clone()}, [5])
    found = Ablation().wrap(Overwriting())(td)
    assert torch.equal(td["input"], x)
    total = 2 * x.sum(-1, keepdim=True)
    torch.testing.assert_close(found["attr", "input"], total**2 - (total - 2 * x) ** 2)


def test_one_graph() -> None:
    net, td = picture_net(), pictures(3)
    for method in (
        Occlusion(Target("output", "all"), window=(3, 4), strides=2),
        Ablation(Target("output", "argmax"), features=patches((2, 9, 8), 4)),
    ):
        graph = type(method).__new__(type(method))
        graph.__dict__.update(method.__dict__, compile={"backend": "aot_eager"})
        eager, explained = method.wrap(net)(td.clone()), graph.wrap(net)
        for _ in range(2):
            torch.testing.assert_close(explained(td.clone()), eager, rtol=1e-10, atol=1e-12)


def test_a_small_budget_changes_nothing() -> None:
    net, td = picture_net(), pictures(3)
    target = Target("output", 0)
    found = [
        Occlusion(target, window=(2, 2), memory_budget=budget).wrap(net)(td.clone())["attr", "input"]
        for budget in (0, 20_000, None)
    ]
    torch.testing.assert_close(found[0], found[2])
    torch.testing.assert_close(found[1], found[2])


def test_features_that_a_function_numbers_otherwise_in_a_later_call() -> None:
    torch.manual_seed(0)
    net, td = (
        nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)),
        TensorDict({"input": torch.randn(3, 4)}, [3]),
    )
    numbers = [torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 1, 0])]
    explained = Ablation(features=lambda shape: numbers[0]).wrap(net)
    for _ in range(2):
        wanted = Ablation(features=numbers[0]).wrap(net)(td.clone())["attr", "input"]
        torch.testing.assert_close(explained(td.clone())["attr", "input"], wanted)
        numbers.reverse()


class Shares(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / x.sum(-1, keepdim=True)


@pytest.mark.parametrize("method", [Ablation, partial(Occlusion, window=1)])
def test_a_target_that_is_not_finite_on_the_baseline_is_told_with_the_way_out(method: Any) -> None:
    torch.manual_seed(0)
    net, td = (
        nn.Sequential(Shares(), nn.Linear(3, 2)).double(),
        TensorDict({"input": torch.rand(4, 3).double()}, [4]),
    )
    with pytest.raises(
        ValueError, match=r"'0' \(Shares\) is the first .* are the baseline.*batch_dims=1 if all do"
    ):
        method(Target("output", 0)).wrap(net)(td.clone())
    found = method(Target("output", 0), batch_dims=1).wrap(net)(td.clone())["attr", "input"]
    for entry in range(3):
        without = td["input"].clone()
        without[:, entry] = 0
        lost = (net(td["input"]) - net(without))[:, 0].detach()
        torch.testing.assert_close(found[:, entry], lost)


def test_mistakes() -> None:
    net, td = picture_net(), pictures(3)
    with pytest.raises(ValueError, match="Occlusion has windows for features; Ablation takes features="):
        Occlusion(window=2, features="whole")
    with pytest.raises(
        ValueError, match=r"a window of \[1, 2, 3, 4\] over 'input', of which one element has shape"
    ):
        Occlusion(Target("output", 0), window=(1, 2, 3, 4)).wrap(net)(td.clone())
    with pytest.raises(ValueError, match=r"strides of \[3, 3\] for windows of \[2, 2\] leave entries out"):
        Occlusion(Target("output", 0), window=(2, 2), strides=3).wrap(net)(td.clone())
