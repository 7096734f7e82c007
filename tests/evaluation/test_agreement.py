"""Agreement of methods, and the measures of it, against pairs that are counted one by one."""

from __future__ import annotations

import math

import pytest
import torch
from evaluated_models import network, random_inputs
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict

from tdhook import LRP, Target
from tdhook.evaluation import (
    Gradient,
    GradientTimesInput,
    RandomMap,
    agreement,
    cosine,
    explained_by,
    kendall,
    sign_agreement,
    spearman,
    top_overlap,
)

pairs = st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=2, max_size=20)


def sign(x: float) -> int:
    return (x > 0) - (x < 0)


@given(values=pairs)
def test_kendalls_correlation_is_that_of_pairs_counted_one_by_one(values: list[tuple[int, int]]) -> None:
    a, b = map(list, zip(*values, strict=True))
    signs = [(sign(a[i] - a[j]), sign(b[i] - b[j])) for i in range(len(a)) for j in range(i)]
    ordered_a, ordered_b = sum(x != 0 for x, _ in signs), sum(y != 0 for _, y in signs)
    same = sum(x * y for x, y in signs)
    expected = same / math.sqrt(ordered_a * ordered_b) if ordered_a and ordered_b else 0.0
    found = kendall(torch.tensor(a, dtype=torch.float32), torch.tensor(b, dtype=torch.float32))
    assert found.item() == pytest.approx(expected, abs=1e-12)


@given(values=pairs, count=st.integers(1, 20))
def test_overlap_and_signs(values: list[tuple[int, int]], count: int) -> None:
    a, b = (torch.tensor(x).double() for x in zip(*values, strict=True))
    count = min(count, len(a))
    found = top_overlap(a, b, count).item()
    assert 0.0 <= found <= 1.0 + 1e-12
    assert top_overlap(a, a, count).item() == pytest.approx(1.0)
    assert found == pytest.approx(top_overlap(b, a, count).item())
    if len(set(a.tolist())) == len(set(b.tolist())) == len(a):  # no ties: sets
        top = [set(x.argsort(descending=True)[:count].tolist()) for x in (a, b)]
        assert found == pytest.approx(len(top[0] & top[1]) / count)
    same = sum(sign(x) == sign(y) for x, y in values) / len(values)
    assert sign_agreement(a, b).item() == pytest.approx(same)


@pytest.mark.parametrize("measure", [spearman, kendall, sign_agreement, lambda a, b: top_overlap(a, b, 4)])
def test_what_keeps_order_and_sign_changes_nothing(measure: object) -> None:
    a, b = torch.randn(3, 4, 17).double(), torch.randn(3, 4, 17).double()
    found = measure(a, b)  # type: ignore[operator]
    assert found.shape == (3, 4)
    torch.testing.assert_close(measure(5 * a, b**3), found)  # type: ignore[operator]
    torch.testing.assert_close(measure(a, a), torch.ones(3, 4).double())  # type: ignore[operator]


def test_opposite_and_constant_maps() -> None:
    a = torch.randn(9)
    assert kendall(a, -a).item() == -1.0 and spearman(a, -a).item() == pytest.approx(-1.0)
    assert sign_agreement(a, -a).item() == 0.0
    assert kendall(a, torch.ones(9)).item() == 0.0
    # One that knows nothing has the overlap of chance.
    assert top_overlap(a, torch.ones(9), 3).item() == pytest.approx(3 / 9)
    assert kendall(torch.randn(5, 1), torch.randn(5, 1)).tolist() == [0.0] * 5
    with pytest.raises(ValueError, match="the 10 most relevant of 9 features: give 1 to 9"):
        top_overlap(a, a, 10)


def test_explanations_of_one_question() -> None:
    model, td = network(), random_inputs(2, 3)
    td["attr", "input"] = torch.zeros(2, 3, 5)  # of an earlier explanation
    methods = {"lrp": LRP("epsilon"), "gradient x input": GradientTimesInput(), "chance": RandomMap()}
    found = explained_by(methods, model, td, target=Target("output", "argmax"), chunk_size=4)
    chosen = model(td["input"]).argmax(-1)
    expected = GradientTimesInput(Target("output", chosen)).wrap(model)(td.exclude("attr"))
    torch.testing.assert_close(found["gradient x input"]["attr", "input"], expected["attr", "input"])
    assert bool((td["attr", "input"] == 0).all())
    assert set(found["lrp"].keys(True, True)) == {"input", ("attr", "input")}
    alike = agreement(found, top=2)
    assert alike.methods == ("lrp", "gradient x input", "chance")
    assert list(alike.similarity) == ["spearman", "kendall", "top", "sign"]
    assert alike.similarity["kendall"].shape == (2, 3, 3, 3)
    lrp, product = (found[name]["attr", "input"] for name in alike.methods[:2])
    torch.testing.assert_close(alike.between("lrp", "gradient x input", "kendall"), kendall(lrp, product))
    torch.testing.assert_close(alike.between("gradient x input", "lrp", "top"), top_overlap(lrp, product, 2))
    assert bool((alike.between("lrp", "gradient x input") > 0.99).all())  # without biases they are the same
    torch.testing.assert_close(alike.mean().diagonal(), torch.ones(3).double())
    assert alike.to_dict()["sign"]["lrp"]["chance"] == pytest.approx(alike.mean("sign")[0, 2].item())  # type: ignore[index]
    within = alike.intervals(trajectories=torch.tensor([[0] * 3, [1] * 3]))["spearman"]
    torch.testing.assert_close(within.mean, alike.mean())
    assert within.low.shape == (3, 3)
    one = agreement({name: each[0, 0] for name, each in found.items()}, top=2)
    torch.testing.assert_close(one.mean("top"), alike.similarity["top"][0, 0])


def test_measures_sizes_groups_and_chunks() -> None:
    td = {name: TensorDict({"attr": {"x": torch.randn(7, 6)}}, [7]) for name in ("a", "b")}
    a, b = (each["attr", "x"].double() for each in td.values())
    own = agreement(td, measures={"cosine": cosine}, chunk_size=3)
    torch.testing.assert_close(own.between("a", "b", "cosine"), cosine(a, b))
    by_size = agreement(td, absolute=True, top=3)
    torch.testing.assert_close(by_size.between("a", "b", "top"), top_overlap(a.abs(), b.abs(), 3))
    torch.testing.assert_close(by_size.between("a", "b", "sign"), sign_agreement(a, b))
    grouped = agreement(td, groups=torch.tensor([0, 0, 0, 0, 1, 2]))
    sums = [torch.stack([x[:, :4].sum(1), x[:, 4], x[:, 5]], 1) for x in (a, b)]
    torch.testing.assert_close(grouped.between("a", "b"), spearman(*sums))


def test_errors() -> None:
    one = TensorDict({"attr": {"x": torch.randn(7, 6)}}, [7])
    with pytest.raises(ValueError, match="explanations of at least two methods are compared; got a"):
        agreement({"a": one})
    with pytest.raises(ValueError, match=r"'b' explains a batch of size \[6\], and 'a' one of \[7\]"):
        agreement({"a": one, "b": one[:6]})
    with pytest.raises(ValueError, match="'b' has relevance of 5 features, and 'a' of 6"):
        agreement({"a": one, "b": TensorDict({"attr": {"x": torch.randn(7, 5)}}, [7])})
    with pytest.raises(KeyError, match="'x' has no relevance; there is that of 'y'"):
        agreement({"a": one, "b": TensorDict({"attr": {"y": torch.randn(7, 6)}}, [7])})
    with pytest.raises(KeyError, match="there is no 'c' among 'a', 'b'"):
        agreement({"a": one, "b": one}).between("a", "c")
    with pytest.raises(ValueError, match="one output is evaluated at a time"):
        explained_by({"g": Gradient(Target("output", "all"))}, network(), random_inputs(3))
