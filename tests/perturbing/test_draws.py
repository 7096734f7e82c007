"""Draws: noise is normal and the same in each call; flips and shifts are undone exactly."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tdhook.perturbing.draws import Flips, Noise, Shifts


def test_noise_is_normal() -> None:
    x = torch.zeros(100, 100).double()
    noise = Noise(1.0, 20).changed("x", x.unsqueeze(0), 1, range(20)).flatten()  # 200,000 numbers
    error = 1 / math.sqrt(noise.numel())
    assert noise.mean().abs() < 4 * error
    assert (noise.square().mean() - 1).abs() < 4 * error * math.sqrt(2)
    assert (noise**3).mean().abs() < 4 * error * math.sqrt(15)
    assert ((noise**4).mean() - 3).abs() < 4 * error * math.sqrt(96)
    share = (noise.unsqueeze(1) < torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0])).double().mean(0)
    expected = torch.tensor([0.02275, 0.158655, 0.5, 0.841345, 0.97725]).double()
    torch.testing.assert_close(share, expected, rtol=0, atol=4 * error)


def test_draws_keys_and_seeds_have_nothing_to_do_with_each_other() -> None:
    x = torch.zeros(1, 20_000).double()
    one = Noise(1.0, 4).changed("x", x, 1, range(4))[:, 0]
    other_key = Noise(1.0, 4).changed("y", x, 1, range(4))[:, 0]
    other_seed = Noise(1.0, 4, seed=1).changed("x", x, 1, range(4))[:, 0]
    for a, b in ((one[0], one[1]), (one[2], one[3]), (one, other_key), (one, other_seed)):
        assert (a * b).mean().abs() < 4 / math.sqrt(a.numel())
    assert (one[:, 1:] * one[:, :-1]).mean().abs() < 4 / math.sqrt(80_000)


@given(st.lists(st.integers(1, 4), max_size=3), st.lists(st.integers(1, 4), max_size=2), st.integers(1, 6))
def test_the_noise_of_a_draw_is_the_same_for_all_elements_and_chunks(shape, batch, cut) -> None:
    x, noise = torch.randn((*batch, *shape)).double(), Noise(0.5, 6)
    whole = noise.changed("x", x, len(batch), range(6))
    assert whole.shape == (6, *x.shape)
    parts = [noise.changed("x", x, len(batch), range(a, b)) for a, b in ((0, cut), (cut, 6))]
    assert torch.equal(whole, torch.cat(parts))
    added = (whole - x).reshape(6, -1, *shape)
    torch.testing.assert_close(added, added[:, :1].expand_as(added))
    assert noise.undone("x", whole, 1 + len(batch), range(6)) is whole


def test_scales() -> None:
    x = torch.randn(5, 3).double()
    one = Noise(1.0, 4).changed("x", x, 1, range(4)) - x
    scale = torch.tensor([0.0, 1.0, 2.0])
    each = Noise(scale, 4).changed("x", x, 1, range(4)) - x
    torch.testing.assert_close(each, one * scale)
    named = Noise({("a", "b"): 2.0, "x": 0.5}, 4)
    torch.testing.assert_close(named.changed("x", x, 1, range(4)) - x, 0.5 * one)
    assert torch.equal(named.changed("other", x, 1, range(4)), x.expand(4, 5, 3))
    ranges = x.amax(1, keepdim=True) - x.amin(1, keepdim=True)
    relative = Noise(0.1, 4, relative=True).changed("x", x, 1, range(4)) - x
    torch.testing.assert_close(relative, 0.1 * ranges * one)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_noise_has_the_precision_of_its_input(dtype) -> None:
    x = torch.zeros(5, 7, dtype=dtype)
    found = Noise(0.5, 3).changed("x", x, 1, range(3))
    assert found.dtype is dtype
    exact = Noise(0.5, 3).changed("x", x.double(), 1, range(3))
    torch.testing.assert_close(found.double(), exact, rtol=1e-2, atol=1e-2)


@given(st.integers(0, 2), st.sampled_from([(-1,), (-2,), (-1, -2), (-2, -1)]))
def test_flips_are_undone(dims, axes) -> None:
    x = torch.randn(*(2, 3)[:dims], 6, 7)
    over = Flips(*axes)
    assert over.samples == 2 ** len(axes)
    there = over.changed("x", x, dims, range(over.samples))
    assert torch.equal(there[0], x)
    assert torch.equal(there[-1], x.flip(axes))
    back = over.undone("x", there, dims + 1, range(over.samples))
    assert torch.equal(back, x.expand_as(back))
    several = over.undone(
        "x", there.unsqueeze(1).repeat(1, 3, *(1,) * x.dim()), dims + 2, range(over.samples)
    )
    assert torch.equal(several, x.expand_as(several))  # several outputs


@given(st.integers(0, 2), st.integers(0, 2), st.sampled_from([(-1,), (-2, -1)]))
def test_shifts_are_undone(dims, most, axes) -> None:
    x = torch.randn(*(2, 3)[:dims], 6, 7)
    over = Shifts(most, axes)
    assert over.samples == (2 * most + 1) ** len(axes)
    there = over.changed("x", x, dims, range(over.samples))
    assert len({tuple(one.flatten().tolist()) for one in there}) == over.samples
    assert torch.equal(there[over.samples // 2], x)
    back = over.undone("x", there, dims + 1, range(over.samples))
    assert torch.equal(back, x.expand_as(back))


def test_inputs_without_the_axes_stay() -> None:
    """Those of the batch are none of an element's."""
    x = torch.randn(4, 5)
    for over in (Flips(-1, -2), Shifts(1)):
        found = over.changed("x", x, 2, range(over.samples))
        assert torch.equal(found, x.expand_as(found))
    found = Flips(-1, -2).changed("x", x, 1, range(4))
    assert torch.equal(found, torch.stack([x, x.flip(-1), x, x.flip(-1)]))


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="the scale of noise is a standard deviation, which is not negative"):
        Noise(torch.tensor([1.0, -1.0]))
    with pytest.raises(ValueError, match="which is not negative"):
        Noise({"x": -1.0})
    for samples in (0, 1.5, True):
        with pytest.raises(ValueError, match=f"at least one, got {samples!r}"):
            Noise(1.0, samples)
    with pytest.raises(
        ValueError, match=r"the scale of noise for 'x' has shape \[2\]; one element of the batch has \[3\]"
    ):
        Noise(torch.ones(2)).changed("x", torch.zeros(5, 3), 1, range(2))
    for axes in ((), (0,), (-1, 1)):
        with pytest.raises(ValueError, match="flips are along axes counted from the end, like -1, got"):
            Flips(*axes)
    for most, axes in ((-1, (-1,)), (1, ()), (1, (0,))):
        with pytest.raises(ValueError, match=f"got most={most}, axes="):
            Shifts(most, axes)
