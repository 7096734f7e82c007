"""RISE: masks, and the mean over them, written out."""

from __future__ import annotations

import random

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from tdhook import Target
from tdhook.attribution import RISE
from tdhook.perturbing.windows import SoftGrids


def picture_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(3 * 10 * 8, 4)).double()


def pictures(*batch: int) -> TensorDict:
    torch.manual_seed(1)
    return TensorDict({"input": torch.randn(*batch, 2, 12, 10).double()}, list(batch))


@pytest.mark.parametrize("batch", [(3,), (2, 2)])
def test_the_mean_written_out(batch) -> None:
    net, td = picture_net(), pictures(*batch)
    masks = SoftGrids((), (12, 10), 50, 4, 0.4, random.Random(7)).masks(range(50)).double()
    x = td["input"].reshape(-1, 2, 12, 10)
    with torch.no_grad():
        total = sum(net(x * mask)[:, 1].reshape(-1, 1, 1) * mask for mask in masks)
    method = RISE(Target("output", 1), masks=50, cells=4, share=0.4, seed=7)
    found = method.wrap(net)(td)["attr", "input"]
    expected = (total / (50 * 0.4)).reshape(*batch, 12, 10)
    torch.testing.assert_close(found.sum(-3), expected)
    torch.testing.assert_close(found[..., 0, :, :], found[..., 1, :, :])


def test_masks_are_there_as_often_as_they_should() -> None:
    masks = SoftGrids((), (20, 30), 2000, 5, 0.3, random.Random(0)).masks(range(2000))
    assert masks.amin() >= 0
    assert masks.amax() <= 1
    torch.testing.assert_close(masks.mean(0), torch.full((20, 30), 0.3), rtol=0, atol=0.04)


def test_several_outputs_and_one_graph() -> None:
    net, td = picture_net(), pictures(3)
    every = RISE(Target("output", "all"), masks=20).wrap(net)(td.clone())["attr", "input"]
    one = RISE(Target("output", 2), masks=20).wrap(net)(td.clone())["attr", "input"]
    torch.testing.assert_close(every[:, 2], one)
    graph = RISE(Target("output", 2), masks=20, compile={"backend": "aot_eager"}).wrap(net)
    for _ in range(2):
        torch.testing.assert_close(graph(td.clone())["attr", "input"], one)


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="RISE has pixels for features; Ablation takes features="):
        RISE(features="whole")
    with pytest.raises(
        ValueError, match=r"masks=0 of cells=7, of which share=0\.5 are there: give at least one"
    ):
        RISE(masks=0)
    td = TensorDict({"input": torch.randn(3, 4)}, [3])
    with pytest.raises(
        ValueError, match=r"RISE is of pictures .* and one element of 'input' has shape \[4\]"
    ):
        RISE(Target("output", 0)).wrap(nn.Linear(4, 2))(td)
