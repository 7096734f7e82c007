"""Localisation against what is counted by hand, and what is known of perfect and of empty maps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict
from torch import Tensor

from tdhook.evaluation import localisation

SHAPE = (6, 7)


def maps(relevance: Tensor, batch: int = 1) -> TensorDict:
    """Relevance of pictures, ``[*batch, *shape]``."""
    size = relevance.shape[:batch]
    return TensorDict(
        {"attr": {"pixels": relevance}, "pixels": torch.zeros(relevance.shape)}, batch_size=size
    )


@st.composite
def masked(draw: Any) -> tuple[Tensor, Tensor]:
    """Some maps, and masks with something in them."""
    torch.manual_seed(draw(st.integers(0, 10_000)))
    rows, levels = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    mask = torch.rand(rows, *SHAPE) < draw(st.floats(0.05, 0.95))
    mask[:, 2, 3] = True
    return torch.randint(-levels, levels + 1, (rows, *SHAPE)).float(), mask


@given(case=masked(), scale=st.floats(1e-20, 1e20), absolute=st.booleans())
def test_figures_are_shares_that_know_no_scale(
    case: tuple[Tensor, Tensor], scale: float, absolute: bool
) -> None:
    relevance, mask = case
    masks = TensorDict({"pixels": mask}, [len(mask)])
    found, scaled = (
        localisation(maps(each), masks, absolute=absolute) for each in (relevance, scale * relevance)
    )
    for name, values in found.figures().items():
        assert bool(((values >= 0) & (values <= 1 + 1e-12)).all()), name
        torch.testing.assert_close(values, scaled.figures()[name], rtol=1e-6, atol=1e-6)


@given(case=masked())
def test_figures_are_those_counted_one_by_one(case: tuple[Tensor, Tensor]) -> None:
    relevance, mask = case
    found = localisation(maps(relevance), TensorDict({"pixels": mask}, [len(mask)]))
    for i, (values, inside) in enumerate(zip(relevance.double(), mask, strict=True)):
        positive = values.clamp(min=0)
        mass = (positive[inside].sum() / positive.sum()).item() if positive.sum() > 0 else 0.0
        assert found.mass[i].item() == pytest.approx(mass, abs=1e-9)
        best = values == values.max()
        assert found.pointing[i].item() == pytest.approx((best & inside).sum().item() / best.sum().item())
        size = int(inside.sum())
        # The mean over many lots among equals.
        hits = []
        for _ in range(300):
            order = torch.randperm(values.numel())
            top = order[values.flatten()[order].argsort(descending=True, stable=True)][:size]
            hits.append(inside.flatten()[top].double().mean().item())
        assert found.rank[i].item() == pytest.approx(sum(hits) / len(hits), abs=0.07)
        assert found.share[i].item() == pytest.approx(size / values.numel())


@given(case=masked())
def test_a_perfect_map_has_all(case: tuple[Tensor, Tensor]) -> None:
    _, mask = case
    perfect = torch.where(mask, torch.rand(mask.shape) + 0.1, 0.0)
    found = localisation(maps(perfect), TensorDict({"pixels": mask}, [len(mask)]))
    for values in (found.pointing, found.mass, found.rank):
        torch.testing.assert_close(values, torch.ones(len(mask)).double())


def test_a_map_that_is_the_same_everywhere_has_the_score_of_chance() -> None:
    mask = torch.zeros(SHAPE, dtype=torch.bool)
    mask[1:3, 1:4] = True
    found = localisation(maps(torch.ones(3, *SHAPE)), mask)
    for values in found.figures().values():
        torch.testing.assert_close(values, torch.full((3,), 6 / 42).double())
    empty = localisation(maps(torch.zeros(3, *SHAPE)), mask)
    assert empty.mass.tolist() == [0.0] * 3
    torch.testing.assert_close(empty.rank, torch.full((3,), 6 / 42).double())
    assert found.to_dict()["share"] == pytest.approx(6 / 42)
    assert found.intervals()["mass"].mean.item() == pytest.approx(6 / 42)


def test_channels_are_added_up_before_signs_are_looked_at() -> None:
    mask = torch.tensor([[True, False], [False, False]])
    relevance = torch.tensor([[[[3.0, 1.0], [0.0, -5.0]], [[1.0, 1.0], [2.0, 1.0]]]])  # sums 4, 2, 2, -4
    for given_mask in (mask, mask[None]):
        found = localisation(maps(relevance), given_mask)
        assert found.mass.item() == pytest.approx(4 / 8) and found.rank.item() == 1.0
    sized = localisation(maps(relevance), mask, absolute=True)
    assert sized.mass.item() == pytest.approx(4 / 12) and sized.pointing.item() == 0.5
    apart = localisation(maps(relevance), mask.expand(2, 2, 2))
    assert apart.mass.item() == pytest.approx(4 / 9) and apart.rank.item() == 0.5


@pytest.mark.parametrize("tolerance, hit", [(0, 0.0), (1, 0.0), (1.5, 1.0), (2, 1.0)])
def test_the_pointing_game_tolerates_what_is_near(tolerance: float, hit: float) -> None:
    mask = torch.zeros(SHAPE, dtype=torch.bool)
    mask[2, 2] = True
    relevance = torch.zeros(1, *SHAPE)
    relevance[0, 3, 3] = 1.0  # the square root of two away
    found = localisation(maps(relevance), mask, tolerance=tolerance)
    assert found.pointing.item() == hit and found.rank.item() == pytest.approx(0.0)
    assert found.share.item() == pytest.approx(1 / 42)


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_any_batch_shape_and_several_inputs(batch: tuple[int, ...]) -> None:
    td = TensorDict(
        {"attr": {"a": torch.rand(*batch, 4), "n": {"b": torch.rand(*batch, 2, 3)}}}, batch_size=batch
    )
    masks = {"a": torch.tensor([True, True, False, False]), ("n", "b"): torch.zeros(2, 3, dtype=torch.bool)}
    found = localisation(td, masks)
    mass = td["attr", "a"][..., :2].sum(-1) / (td["attr", "a"].sum(-1) + td["attr", "n", "b"].sum((-2, -1)))
    torch.testing.assert_close(found.mass, mass.double(), rtol=1e-5, atol=1e-6)
    assert found.mass.shape == found.pointing.shape == batch
    own = TensorDict({"a": masks["a"].expand(*batch, 4)}, batch_size=batch)
    assert localisation(td, own, keys=["a"]).mass.shape == batch


@pytest.mark.parametrize(
    "masks, options, error, message",
    [
        (
            torch.ones(4, 4, dtype=torch.bool),
            {},
            ValueError,
            r"the mask of 'pixels' has shape \[4, 4\]; one element",
        ),
        (torch.ones(2, 2, *SHAPE, dtype=torch.bool), {}, ValueError, r"the mask of 'pixels' has shape"),
        (torch.ones(SHAPE), {}, TypeError, "the mask of 'pixels' has torch.float32: give truth values"),
        ({}, {}, ValueError, "'pixels' has relevance and no mask: give one that is all false"),
        (
            torch.zeros(SHAPE, dtype=torch.bool),
            {},
            ValueError,
            "the masks of 2 of 2 elements have nothing in them",
        ),
        (
            torch.ones(SHAPE, dtype=torch.bool),
            {"tolerance": -1},
            ValueError,
            "a distance in pixels, 0 or more; got -1",
        ),
        (
            TensorDict({}, [3]),
            {},
            ValueError,
            r"have the batch size of what is explained, \[2\], and not \[3\]",
        ),
        (
            torch.ones(SHAPE, dtype=torch.bool),
            {"keys": ["x"]},
            KeyError,
            "'x' has no relevance; there is that of",
        ),
    ],
)
def test_errors(masks: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        localisation(maps(torch.rand(2, *SHAPE)), masks, **options)


def test_more_errors() -> None:
    mask = torch.ones(4, dtype=torch.bool)
    td = TensorDict({"attr": {"a": torch.rand(2, 4), "b": torch.rand(2, 4)}}, [2])
    with pytest.raises(ValueError, match="a mask is given for one input, and there are 'a', 'b'"):
        localisation(td, mask)
    with pytest.raises(ValueError, match="tolerance is in pixels, and 'a' is no picture"):
        localisation(td, mask, keys=["a"], tolerance=2)
    several = TensorDict({"a": torch.rand(2, 4), "attr": {"a": torch.rand(2, 3, 4)}}, [2])
    with pytest.raises(
        ValueError, match=r"has shape \[2, 3, 4\] for inputs of shape \[2, 4\]: explain one output"
    ):
        localisation(several, mask)
    td["attr", "a"][0, 0] = torch.inf
    with pytest.raises(
        ValueError, match="NaN or infinite values, which have no order and no sum: that of 'a'"
    ):
        localisation(td, mask, keys=["a"])
    with pytest.raises(KeyError, match="there is no relevance under 'attr'"):
        localisation(TensorDict({"a": torch.rand(2, 4)}, [2]), mask)
