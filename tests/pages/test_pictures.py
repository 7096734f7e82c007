"""Pictures in the page of an explained rollout: frames, observed ones, and relevance over them."""

from __future__ import annotations

import base64
import io
import sys
from typing import Any

import numpy as np
import pytest
import torch
from reports import close, rollout, with_frames

from tdhook.pages import pictures


def test_frames_and_their_relevance_come_through(written: Any) -> None:
    image = pytest.importorskip("PIL.Image")
    made = with_frames(rollout(2, 5))
    page = written(made)
    assert page.pictures["every"] == 1 and page.pictures["kind"] == "image/webp"
    for environment, step in ((0, 0), (1, 4)):
        decoded = image.open(io.BytesIO(base64.b64decode(page.pictures["images"][environment][step])))
        assert torch.equal(torch.from_numpy(np.array(decoded)), made["frame"][environment, step])
        expected = made["attr", "frame"][environment, step].clamp(
            -page.pictures["tops"][0], page.pictures["tops"][0]
        )
        assert torch.allclose(page.map(environment, step), expected, atol=page.pictures["tops"][0] / 200)


def test_without_pillow_frames_are_png(written: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    image = pytest.importorskip("PIL.Image")
    made = with_frames(rollout(2), height=7, width=5)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "PIL", None)
        page = written(made)
    assert page.pictures["kind"] == "image/png"
    for step in range(2):
        decoded = image.open(io.BytesIO(base64.b64decode(page.pictures["images"][0][step])))
        assert torch.equal(torch.from_numpy(np.array(decoded)), made["frame"][step])


def test_frames_of_many_colours_may_lose_a_little(written: Any) -> None:
    pytest.importorskip("PIL.Image")
    noise = with_frames(rollout(2), 90, 90)
    assert len(base64.b64decode(written(noise).pictures["images"][0][0])) < 90 * 90 * 2


@pytest.mark.parametrize("shape", [(12, 10), (12, 10, 1)])
def test_grey_frames_are_frames_too(written: Any, shape: tuple[int, ...]) -> None:
    image = pytest.importorskip("PIL.Image")
    made = rollout(2)
    made["frame"] = torch.randint(0, 256, (2, *shape), dtype=torch.uint8)
    decoded = image.open(io.BytesIO(base64.b64decode(written(made).pictures["images"][0][1])))
    expected = made["frame"][1].reshape(12, 10, 1).expand(12, 10, 3)
    assert torch.equal(torch.from_numpy(np.array(decoded)), expected)


def test_pictures_are_thinned_to_what_has_room(written: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = with_frames(rollout(40))
    whole = written(made).path.stat().st_size
    monkeypatch.setattr(pictures, "_CHARACTERS", 6_000)
    page = written(made)
    every = page.pictures["every"]
    assert every > 1 and page.path.stat().st_size < whole - 10_000
    assert len(page.pictures["images"][0]) == len(page.pictures["maps"][0][0]) == -(-40 // every)
    assert sum(map(len, page.pictures["images"][0] + page.pictures["maps"][0][0])) < 7_000
    assert f"Of every {every} steps the first has a picture" in page.words
    top = page.pictures["tops"][0]
    assert torch.allclose(page.map(0, 1), made["attr", "frame"][every].clamp(-top, top), atol=top / 200)


def test_large_frames_are_shrunk(written: Any) -> None:
    image = pytest.importorskip("PIL.Image")
    made = rollout(1)
    made["frame"] = torch.full((1, 900, 1300, 3), 7, dtype=torch.uint8)
    made["attr", "frame"] = torch.zeros(1, 300, 260)
    made["attr", "frame"][0, 297:, :] = 3.0
    page = written(made)
    assert image.open(io.BytesIO(base64.b64decode(page.pictures["images"][0][0]))).size == (434, 300)
    assert "1/3 of their size" in page.words and "mean of 3×3 pixels" in page.words
    assert page.pictures["shape"] == [100, 87] and page.pictures["reach"] == [1.0, 87 * 3 / 260]
    expected = torch.zeros(100, 87)
    expected[99] = 3.0
    assert torch.allclose(page.map(0, 0), expected, atol=0.02)


def test_an_observed_picture_is_shown_where_there_is_no_frame(written: Any) -> None:
    image = pytest.importorskip("PIL.Image")
    made = rollout(3)
    made["observation"] = torch.zeros(3, 10, 9, 4)
    made["observation"][:, 2, 5, 1] = 1.0
    made["attr", "observation"] = torch.randn(3, 10, 9, 4)
    page = written(made, features=("paddle", "ball", "trail", "brick"))
    assert page.rows() == ["paddle", "ball", "trail", "brick"]
    assert close(page.view(), made["attr", "observation"].sum((1, 2))[None])
    expected = made["attr", "observation"][1].sum(-1)
    assert torch.allclose(page.map(0, 1), expected, atol=page.pictures["tops"][0] / 100)
    frame = np.array(image.open(io.BytesIO(base64.b64decode(page.pictures["images"][0][0]))))
    assert frame.shape == (10, 9, 3) and frame[2, 5].tolist() == [255] * 3 and frame.sum() == 255 * 3


def test_channels_may_come_first(written: Any) -> None:
    made = rollout(2)
    made["pixels"], made["attr", "pixels"] = torch.rand(2, 3, 8, 9), torch.randn(2, 5, 3, 8, 9)
    page = written(made, features=None, key=("attr", "pixels"))
    assert page.rows() == ["channel 0", "channel 1", "channel 2"]
    assert [view["label"] for view in page.data["views"]] == [f"output {i}" for i in range(5)]
    assert close(page.view(4), made["attr", "pixels"][:, 4].sum((-1, -2))[None])
    assert torch.allclose(page.map(0, 1, 4), made["attr", "pixels"][1, 4].sum(0), atol=0.05)
