"""Sheets of reference frames: what is drawn, not how it looks."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("matplotlib")

from tdhook.plots import overlay, reference_sheet

FRAMES = torch.randint(0, 256, (3, 6, 8, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
RELEVANCE = torch.zeros(3, 6, 8)
RELEVANCE[:, 2, 3] = torch.tensor([1.0, -2.0, 0.5])
FIELDS = torch.tensor([[[1, 2], [4, 6]]] * 3)


def test_frames_with_the_part_that_the_unit_sees_beneath() -> None:
    figure = reference_sheet(FRAMES, RELEVANCE, FIELDS, ["a $1", "b", "c"], "unit 3", scale=2.0, columns=2)
    drawn = [torch.as_tensor(image.get_array()) for axes in figure.axes for image in axes.images]
    expected = overlay(FRAMES, RELEVANCE, scale=2.0)
    frames = [one for one in drawn if one.shape == (6, 8, 3)]
    crops = [one for one in drawn if one.shape == (3, 4, 3)]
    assert [torch.equal(a, b) for a, b in zip(frames, expected, strict=True)] == [True] * 3
    assert [torch.equal(a, b[1:4, 2:6]) for a, b in zip(crops, expected, strict=True)] == [True] * 3
    boxes = [patch.get_bbox().bounds for axes in figure.axes for patch in axes.patches if axes.images]
    assert boxes == [(1.5, 0.5, 4.0, 3.0)] * 3
    figure.canvas.draw()


def test_frames_alone() -> None:
    figure = reference_sheet(FRAMES, RELEVANCE)
    assert len([image for axes in figure.axes for image in axes.images if image.get_array().ndim == 3]) == 3


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="there are 3 frames, and 1 titles were given"):
        reference_sheet(FRAMES, RELEVANCE, titles=["one"])
    with pytest.raises(ValueError, match=r"fields of 3 frames are \[3, 2, 2\], got \[2, 2, 2\]"):
        reference_sheet(FRAMES, RELEVANCE, FIELDS[:2])
    with pytest.raises(ValueError, match="there are 3 frames, and relevance of 2"):
        reference_sheet(FRAMES, RELEVANCE[:2])
