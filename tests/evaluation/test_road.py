"""Imputation against a dense solution of its equations, and the curves of imputed pictures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict
from torch import Tensor, nn

from tdhook import Target
from tdhook.evaluation import GradientTimesInput, RandomMap, imputed, patches, perturbation_curve, road

OUTPUT = Target("output", 0)


def solved(picture: Tensor, removed: Tensor) -> Tensor:
    """The equations of one picture, written out: each removed pixel is the mean of its neighbours."""
    height, width = picture.shape
    matrix, right = torch.eye(picture.numel()).double(), picture.flatten().double().clone()
    for row in range(height):
        for column in range(width):
            if not removed[row, column]:
                continue
            here, total = row * width + column, 0.0
            right[here] = 0.0
            for down in (-1, 0, 1):
                for across in (-1, 0, 1):
                    y, x = row + down, column + across
                    if (down or across) and 0 <= y < height and 0 <= x < width:
                        weight = 1 / 12 if down and across else 1 / 6
                        matrix[here, y * width + x] -= weight
                        total += weight
            matrix[here, here] += total - 1.0
    return torch.linalg.solve(matrix, right).reshape(height, width)


@st.composite
def holes(draw: Any) -> tuple[Tensor, Tensor]:
    torch.manual_seed(draw(st.integers(0, 10_000)))
    shape = (draw(st.integers(1, 4)), draw(st.integers(1, 9)), draw(st.integers(2, 9)))
    removed = torch.rand(shape) < draw(st.floats(0, 1))
    removed[:, 0, draw(st.integers(0, 1))] = False
    return draw(st.sampled_from([1e-3, 1.0, 255.0])) * torch.randn(shape), removed


@given(case=holes())
def test_removed_pixels_solve_their_equations(case: tuple[Tensor, Tensor]) -> None:
    pictures, removed = case
    found = imputed(pictures, removed)
    expected = torch.stack([solved(*each) for each in zip(pictures, removed, strict=True)])
    size = pictures.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-7 * size)
    assert torch.equal(found[~removed], pictures.double()[~removed])
    for i in range(len(pictures)):  # neither below nor above what is left; and whatever else is in the batch
        left = pictures[i][~removed[i]].double()
        assert left.min() - 1e-6 * size <= found[i].min() and found[i].max() <= left.max() + 1e-6 * size
        assert torch.equal(found[i], imputed(pictures[i : i + 1], removed[i : i + 1])[0])


def test_large_holes_empty_and_whole_pictures() -> None:
    pictures = torch.rand(3, 40, 40)
    removed = torch.ones(3, 40, 40, dtype=torch.bool)
    removed[0, 0, 0] = removed[0, -1, -1] = False
    removed[2] = False
    found = imputed(pictures, removed)
    middle = (pictures[0, 0, 0] + pictures[0, -1, -1]).item() / 2
    assert found[0, 20, 19].item() == pytest.approx(middle, abs=0.05)
    torch.testing.assert_close(found[0], solved(pictures[0], removed[0]), rtol=0.0, atol=1e-6)
    torch.testing.assert_close(found[1], pictures[1].double().mean().expand(40, 40))
    assert torch.equal(found[2], pictures[2].double())


def test_a_slope_is_continued() -> None:
    slope = (torch.arange(9.0)[:, None] + 2 * torch.arange(8.0)).expand(1, 9, 8)
    removed = torch.zeros(1, 9, 8, dtype=torch.bool)
    removed[:, 3:6, 2:7] = True
    torch.testing.assert_close(imputed(slope, removed), slope.double())


def network(channels: int = 2) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6 * 6, 3))


def test_curves_are_those_of_pictures_imputed_one_by_one() -> None:
    model, td = network(), TensorDict({"input": torch.randn(3, 2, 8, 8)}, [3])
    curves = road(model, td, GradientTimesInput(OUTPUT), noise=0.0, steps=4)
    relevance = GradientTimesInput(OUTPUT).wrap(model)(td.clone())["attr", "input"].sum(1)
    assert curves.most.fraction.tolist() == [0.0, 0.25, 0.5, 0.75, 1.0]
    for i in range(3):
        order = relevance[i].flatten().argsort(descending=True)
        for step in range(5):
            for curve, first in ((curves.most, order), (curves.least, order.flip(0))):
                removed = torch.zeros(64, dtype=torch.bool)
                removed[first[: 16 * step]] = True
                picture = td["input"][i].double()
                if step < 4:
                    picture = torch.stack([solved(x, removed.reshape(8, 8)) for x in picture])
                else:
                    picture = picture.mean((1, 2), keepdim=True).expand(2, 8, 8)
                with torch.no_grad():
                    value = model(picture.float()[None])[0, 0].item()
                assert curve.value[i, step].item() == pytest.approx(value, abs=1e-4)
    assert curves.intervals()["between"].mean.item() == pytest.approx(curves.between)


@pytest.mark.parametrize("batch", [(), (4,), (2, 2)])
def test_noise_seeds_chunks_and_batches(batch: tuple[int, ...]) -> None:
    model, td = (
        nn.Sequential(nn.Flatten(-3), nn.Linear(128, 3)),
        TensorDict({"input": torch.randn(*batch, 2, 8, 8)}, batch),
    )
    method = RandomMap(Target("output", "argmax"), seed=3)
    options: dict[str, Any] = {"steps": 3, "groups": patches((2, 8, 8), 2)}
    random = torch.get_rng_state()
    one, parts, other, none = (
        road(model, td, method, noise=noise, seed=seed, chunk_size=chunk, **options)
        for noise, seed, chunk in ((0.5, 0, 1024), (0.5, 0, 3), (0.5, 1, 1024), (0.0, 0, 1024))
    )
    assert one.most.value.shape == (*batch, 4)
    if not batch:
        torch.testing.assert_close(one.most.value, parts.most.value, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(one.most.value, other.most.value)
    assert not torch.allclose(one.most.value, none.most.value)
    torch.testing.assert_close(one.most.value[..., 0], none.most.value[..., 0])
    # Where all is replaced, the order has no say.
    torch.testing.assert_close(one.most.value[..., -1], one.least.value[..., -1], rtol=1e-4, atol=1e-5)
    assert torch.equal(torch.get_rng_state(), random)


def test_chunks_change_nothing() -> None:
    model, td = network(), TensorDict({"input": torch.randn(5, 2, 8, 8)}, [5])
    whole, parts = (
        road(model, td, GradientTimesInput(OUTPUT), noise=0.1, chunk_size=chunk, measure="probability")
        for chunk in (1024, 2)
    )
    torch.testing.assert_close(whole.least.value, parts.least.value, rtol=1e-4, atol=1e-5)


def test_what_is_imputed_gives_away_less_than_what_is_black() -> None:
    """Bright pictures of even grey: nothing is lost where the model looks at the mean."""

    class Mean(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean((-3, -2, -1)).unsqueeze(-1)

    td = TensorDict({"input": torch.full((2, 1, 9, 9), 5.0)}, [2])
    imputed_curve = road(Mean(), td, RandomMap(OUTPUT), noise=0.0).most
    black = perturbation_curve(Mean(), td, RandomMap(OUTPUT)).most
    torch.testing.assert_close(imputed_curve.value, torch.full((2, 11), 5.0).double())
    assert black.value[:, -1].tolist() == [0.0, 0.0]


def test_errors() -> None:
    td = TensorDict({"input": torch.randn(2, 2, 8, 8)}, [2])
    with pytest.raises(
        ValueError, match=r"'input' is no picture \[..., height, width\]: one element of it has"
    ):
        road(nn.Linear(5, 3), TensorDict({"input": torch.randn(2, 5)}, [2]), RandomMap(OUTPUT))
    with pytest.raises(ValueError, match="noise is a standard deviation, 0 or more; got -1"):
        road(network(), td, RandomMap(OUTPUT), noise=-1)
    with pytest.raises(ValueError, match="a curve has at least one step, got steps=0"):
        road(network(), td, RandomMap(OUTPUT), steps=0)
