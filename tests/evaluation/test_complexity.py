"""Complexity against its definitions, and what is known of simple and of even maps."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict

from tdhook.evaluation import complexity

sizes = st.lists(st.integers(-9, 9), min_size=2, max_size=12)


def maps(*rows: list[float]) -> TensorDict:
    return TensorDict({"attr": {"input": torch.tensor(rows, dtype=torch.float64)}}, [len(rows)])


def gini(values: list[float]) -> float:
    """The mean difference of two features, as a share of twice the mean."""
    n, total = len(values), sum(values)
    return sum(abs(a - b) for a in values for b in values) / (2 * n * total) if total else 0.0


@given(values=sizes)
def test_figures_are_those_of_their_definitions(values: list[int]) -> None:
    found = complexity(maps([float(v) for v in values]))
    size = [abs(v) for v in values]
    shares = [v / sum(size) for v in size] if sum(size) else [1 / len(size)] * len(size)
    entropy = -sum(p * math.log(p) for p in shares if p)
    assert found.sparseness.item() == pytest.approx(gini(size), abs=1e-9)
    assert found.entropy.item() == pytest.approx(entropy, abs=1e-9)
    assert found.effective.item() == pytest.approx(math.exp(entropy), abs=1e-9)
    assert found.features == len(values)


@given(values=sizes, scale=st.floats(1e-300, 1e290), order=st.randoms())
def test_neither_scale_nor_sign_nor_order_counts(values: list[int], scale: float, order: object) -> None:
    other = [scale * abs(v) for v in values]
    order.shuffle(other)  # type: ignore[attr-defined]
    one, same = complexity(maps([float(v) for v in values])), complexity(maps(other))
    for name, figure in one.figures().items():
        torch.testing.assert_close(figure, same.figures()[name], rtol=1e-9, atol=1e-9)
    assert 1.0 <= one.effective.item() <= len(values) and 0 <= one.sparseness.item() <= 1 - 1 / len(values)


def test_simple_and_even_maps() -> None:
    found = complexity(maps([0.0, -3.0, 0.0, 0.0], [2.0, 2.0, -2.0, 2.0], [0.0] * 4, [1.0, 1.0, 0.0, 0.0]))
    assert found.sparseness.tolist() == pytest.approx([0.75, 0.0, 0.0, 0.5])
    assert found.effective.tolist() == pytest.approx([1.0, 4.0, 4.0, 2.0])
    assert found.to_dict()["effective"] == pytest.approx(11 / 4)
    assert found.intervals(how="t")["entropy"].count == 4


def test_groups_keys_and_batches() -> None:
    td = TensorDict({"attr": {"a": torch.ones(2, 3, 4), "b": torch.full((2, 3, 1), 3.0)}}, [2, 3])
    groups = {"a": torch.tensor([0, 0, 0, 1]), "b": torch.tensor([0])}
    found = complexity(td, groups=groups)
    assert found.features == 3 and found.entropy.shape == (2, 3)
    shares = [3 / 7, 1 / 7, 3 / 7]  # sums, not means
    assert found.entropy[0, 0].item() == pytest.approx(-sum(p * math.log(p) for p in shares))
    assert complexity(td, keys=["b"]).effective.tolist() == [[1.0] * 3] * 2
    assert complexity(td, batch_dims=1).features == 3 * 5
    with pytest.raises(ValueError, match=r"the groups of 'b' have shape \[2\]"):
        complexity(td, keys=["b"], groups=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="there is nothing to evaluate"):
        complexity(td[:0])
