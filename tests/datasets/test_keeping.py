"""What is kept of relevance is all of it, summed as was asked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tdhook.datasets import Kept
from tdhook.datasets.folder import JobFolder, Layout
from tdhook.datasets.keeping import as_kept

KEY = ("attr", "pixels")


def kept(value: Tensor, axes: int = 1, **how: Any) -> Tensor:
    return Kept(**how).of({KEY: value}, {KEY: "pixels"}, {KEY: axes})[KEY]


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 5))
def test_blocks_of_pixels_are_sums(height: int, width: int, side: int) -> None:
    value = torch.arange(2.0 * 3 * height * width).reshape(2, 3, height, width)
    found = kept(value, pooled=side)
    assert found.shape == (2, 3, -(-height // side), -(-width // side))
    torch.testing.assert_close(found.sum((-2, -1)), value.sum((-2, -1)))
    assert torch.equal(found[..., 0, 0], value[..., :side, :side].sum((-2, -1)))


def test_axes_and_regions_are_sums() -> None:
    value = torch.randn(5, 2, 3, 4, 4, dtype=torch.float64)  # [rows, outputs, channels, height, width]
    assert torch.equal(kept(value, 2, summed=[-2, -1]), value.sum((-2, -1)))
    assert torch.equal(kept(value, 2, summed=[0]), value.sum(2))
    left = torch.zeros(4, 4, dtype=torch.bool)
    left[:, :2] = True
    found = kept(value, 2, regions={"left": left, "right": ~left})
    assert found.shape == (5, 2, 2)
    torch.testing.assert_close(found[..., 0], value[..., :2].sum((-3, -2, -1)))
    torch.testing.assert_close(found.sum(-1), value.sum((-3, -2, -1)))


def test_what_is_no_relevance_is_kept_as_it_is() -> None:
    entries = {KEY: torch.randn(3, 8, 8), ("ledger", "gap"): torch.randn(3), "row": torch.arange(3)}
    found = Kept(pooled=4, dtype=torch.bfloat16).of(entries, {KEY: "pixels"}, {KEY: 1})
    assert found[KEY].shape == (3, 2, 2) and found[KEY].dtype is torch.bfloat16
    assert found["ledger", "gap"].shape == (3,) and found["row"].dtype is torch.int64
    only = Kept(keys=["speed"])
    both = {KEY: torch.randn(3, 2), ("attr", "speed"): torch.randn(3)}
    relevance = {KEY: "pixels", ("attr", "speed"): "speed"}
    assert {*only.of(both, relevance, dict.fromkeys(both, 1))} == {("attr", "speed")}
    with pytest.raises(KeyError, match="keep= names 'sped'; there is relevance of 'pixels', 'speed'"):
        Kept(keys=["sped"]).of(both, relevance, dict.fromkeys(both, 1))


def test_what_cannot_be_kept() -> None:
    with pytest.raises(ValueError, match=r"not in torch\.float16: small relevance would be zero in it"):
        Kept(dtype=torch.float16)
    with pytest.raises(ValueError, match="give one of these"):
        Kept(summed=[0], pooled=2)
    with pytest.raises(ValueError, match="at least one pixel, got pooled=0"):
        Kept(pooled=0)
    value = torch.randn(3, 4)
    with pytest.raises(ValueError, match="pooled= sums blocks of the last two axes, and 'pixels' has 1"):
        kept(value, pooled=2)
    with pytest.raises(ValueError, match=r"'pixels' has 1 axes of features, and summed=\(1,\)"):
        kept(value, summed=[1])
    with pytest.raises(ValueError, match=r"the region 'left' of shape \(5,\) does not fit 'pixels'"):
        kept(value, regions={"left": torch.ones(5)})
    with pytest.raises(TypeError, match="the region 'left' has other values than 0 and 1"):
        Kept(regions={"left": torch.tensor([0.5, 1.0])})
    with pytest.raises(ValueError, match="keep='some' is neither 'all', 'compressed', a dtype"):
        as_kept("some")


@given(
    seed=st.integers(0, 5),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int64]),
)
def test_a_block_is_read_as_it_was_written(seed: int, dtype: torch.dtype, tmp_path_factory: Any) -> None:
    torch.manual_seed(seed)
    value = torch.randn(7, 3, 5)
    value[torch.rand(7, 3, 5) < 0.8] = 0
    value[0, 0, 0] = -0.0
    found = {KEY: value.to(dtype), ("ledger", "gap"): torch.randn(7), "none": torch.zeros(7, 2)}
    folder = JobFolder(tmp_path_factory.mktemp("job"))
    folder.write_block(3, found)
    again = folder.read_block(3, 7, Layout.of(found))
    for key, expected in found.items():
        assert again[key].dtype == expected.dtype and torch.equal(again[key], expected)
        assert torch.equal(again[key].signbit(), expected.signbit())


def test_a_block_of_zeros_is_small(tmp_path_factory: Any) -> None:
    value = torch.randn(50, 4, 20, 20)
    value[torch.rand(value.shape) < 0.81] = 0
    folder = JobFolder(tmp_path_factory.mktemp("job"))
    folder.write_block(0, {KEY: value})
    size = next(folder.blocks.iterdir()).stat().st_size
    assert size < 0.25 * value.numel() * 4
