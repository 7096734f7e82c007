"""Reducers say of all rows what is said of them at once, however they are cut."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from tdhook import LRP, Target
from tdhook.datasets import Histogram, Job, Moments, Reducer, Reservoir, TopRows
from tdhook.datasets.reducing import Part, Piece


def piece(values: Tensor, labels: Tensor | None = None, begin: int = 0) -> Piece:
    count = len(values)
    data = TensorDict({} if labels is None else {"action": labels}, [count])
    return Piece(data, torch.arange(begin, begin + count), {"x": values}, {("attr", "x"): values})


def cut(reducer: Reducer, values: Tensor, labels: Tensor | None, ends: list[int]) -> list[Part]:
    edges = [0, *sorted(set(ends)), len(values)]
    return [
        reducer.part(piece(values[a:b], None if labels is None else labels[a:b], a))
        for a, b in pairwise(edges)
        if b > a
    ]


cuts = st.lists(st.integers(0, 60), max_size=6)
REDUCERS = {
    "moments": lambda by: Moments(by=by),
    "histogram": lambda by: Histogram(by=by),
    "pooled": lambda by: Histogram(by=by, pooled=True),
    "top": lambda by: TopRows(5, by=by),
    "reservoir": lambda by: Reservoir(7, by=by),
}


@pytest.mark.parametrize("by", [None, "action"])
@pytest.mark.parametrize("name", REDUCERS)
@given(cuts, st.integers(0, 5))
def test_cuts_make_no_difference(name: str, by: str | None, ends: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    values = torch.randn(60, 3) * torch.randn(60, 1).exp()
    values[torch.rand(60) < 0.2] = 0
    labels = torch.randint(4, (60,))
    reducer = REDUCERS[name](by)
    whole = reducer.result(reducer.merged([reducer.part(piece(values, labels))]))
    parts = cut(reducer, values, labels, ends)
    found = reducer.result(reducer.merged(parts))
    again = reducer.result(reducer.merged(parts))
    assert found.keys() == whole.keys()
    for what, value in whole.items():
        torch.testing.assert_close(found[what], value, rtol=1e-12, atol=1e-12)
        assert torch.equal(found[what], again[what])
        if name != "moments":
            assert torch.equal(found[what], value), what


def test_moments_are_those_of_torch() -> None:
    torch.manual_seed(0)
    values, labels = torch.randn(50, 2, 3, dtype=torch.float64), torch.randint(3, (50,))
    reducer = Moments(by="action")
    found = reducer.result(reducer.merged(cut(reducer, values, labels, [7, 30])))
    for i, group in enumerate(found["group"].tolist()):
        mine = values[labels == group]
        assert found["count"][i] == len(mine)
        torch.testing.assert_close(found["mean"][i], mine.mean(0))
        torch.testing.assert_close(found["variance"][i], mine.var(0, unbiased=False))
        torch.testing.assert_close(found["absolute"][i], mine.abs().mean(0))
        assert torch.equal(found["least"][i], mine.amin(0)) and torch.equal(found["most"][i], mine.amax(0))


def test_moments_of_large_numbers_that_differ_little() -> None:
    values = 1e9 + torch.tensor([[0.0], [1.0], [2.0]] * 100, dtype=torch.float64)
    reducer = Moments()
    found = reducer.result(reducer.merged(cut(reducer, values, None, [100, 200])))
    torch.testing.assert_close(
        found["variance"], torch.full((1, 1), 2 / 3, dtype=torch.float64), rtol=1e-6, atol=0
    )


@given(st.integers(0, 20))
def test_quantiles_are_right_to_within_their_bin(seed: int) -> None:
    torch.manual_seed(seed)
    values = torch.randn(500, 2, dtype=torch.float64) ** 3
    reducer = Histogram()
    found = reducer.result(reducer.part(piece(values)))
    assert found["count"].sum(-1).tolist() == [[500, 500]]
    exact = values.quantile(
        torch.tensor(Histogram.QUANTILES, dtype=torch.float64), dim=0, interpolation="lower"
    ).T
    torch.testing.assert_close(found["quantiles"][0], exact, rtol=0.07, atol=1e-3)


def test_each_value_is_in_its_bin() -> None:
    values = torch.tensor([0.0, 1.0, -1.0, 1.124, 1.125, 2.0, -(2.0**-70), 2.0**70, 0.3])[:, None]
    reducer = Histogram()
    found = reducer.result(reducer.part(piece(values)))
    edges, middle = found["edges"], (len(found["edges"]) - 1) // 2
    for value in values[:, 0].tolist():
        alone = reducer.part(piece(torch.tensor([[value]])))["count"][0, 0]
        place = int(alone.argmax())
        assert (place == middle) is (value == 0)
        assert edges[place].item() <= value <= edges[place + 1].item()
    assert int(found["count"].sum()) == len(values)


def test_quantiles_beyond_all_bins_say_so() -> None:
    values = torch.tensor([-(2.0**70), -(2.0**-70), 2.0**-70, 2.0**70])[:, None]
    reducer = Histogram(by=lambda rows: torch.arange(4))
    found = reducer.result(reducer.part(piece(values)))["quantiles"][:, 0, 2].tolist()
    assert (
        found[0] == -torch.inf and -(2.0**-64) < found[1] < 0 < found[2] < 2.0**-64 and found[3] == torch.inf
    )


def test_the_most_extreme_rows() -> None:
    values = torch.tensor([[1.0, -9.0], [2.0, 2.0], [4.0, 0.0], [0.0, 4.0], [-5.0, 1.0]])
    data = piece(values)
    for score, rows in [("sum", [1, 2]), ("absolute", [0, 4]), ("most", [2, 3]), (1, [3, 1])]:
        reducer = TopRows(2, score=score)  # type: ignore[arg-type]
        found = reducer.result(reducer.part(data))
        assert found["row"].tolist() == rows, score
        assert torch.equal(found["relevance"], values[rows])
    reducer = TopRows(1, score=lambda x: -x[:, 0], with_rows=False)
    found = reducer.result(reducer.part(data))
    assert found["row"].tolist() == [4] and "relevance" not in found
    with pytest.raises(IndexError, match="score=2, and there are 2 features"):
        TopRows(1, score=2).part(data)
    with pytest.raises(ValueError, match=r"gives \(2,\) for 5 rows; it is to give one number each"):
        TopRows(1, score=lambda x: x[0]).part(data)


def test_every_row_is_as_likely_to_be_drawn() -> None:
    count = torch.zeros(40)
    for seed in range(400):
        reducer = Reservoir(10, seed=seed)
        found = reducer.result(reducer.part(piece(torch.randn(40, 1))))
        assert len(found["row"]) == 10 and bool((found["row"].diff() > 0).all())
        count[found["row"]] += 1
    # A quarter of 400 draws each: five standard deviations are 43.
    assert count.min() > 57 and count.max() < 143


def test_rows_are_told_apart_by_what_is_one_whole_number_each() -> None:
    values = torch.randn(4, 2)
    one_hot = torch.eye(3)[[0, 2, 2, 1]].long()
    assert Moments(by="action").part(piece(values, one_hot))["group"].tolist() == [0, 1, 2]
    assert Moments(by=lambda td: torch.tensor([5, 5, 6, 6])).part(piece(values))["group"].tolist() == [5, 6]
    truth = torch.tensor([[True], [False], [True], [True]])
    assert Moments(by="action").part(piece(values, truth))["count"].tolist() == [1, 3]
    for wrong in (
        torch.randn(4),
        torch.ones(4, 3, dtype=torch.int64),
        torch.zeros(4, 2, 2, dtype=torch.int64),
    ):
        with pytest.raises(ValueError, match="rows are told apart by"):
            Moments(by="action").part(piece(values, wrong))
    with pytest.raises(KeyError, match="rows are told apart by 'action', and the source has"):
        Moments(by="action").part(piece(values))


def test_what_is_ambiguous_is_asked_for() -> None:
    both = Piece(TensorDict({}, [2]), torch.arange(2), {"x": torch.ones(2, 1), "y": torch.zeros(2, 1)}, {})
    with pytest.raises(KeyError, match="no key is named, and there is relevance of 'x', 'y': give it key="):
        Moments().part(both)
    with pytest.raises(KeyError, match="'z' is named, and there is relevance of 'x', 'y'"):
        Moments("z").part(both)
    assert Moments("y").part(both)["mean"].tolist() == [[0.0]]
    with pytest.raises(ValueError, match=r"a histogram for each of 2000 features is too much"):
        Histogram().part(piece(torch.zeros(1, 2000)))
    for wrong in (lambda: TopRows(0), lambda: Reservoir(0)):
        with pytest.raises(ValueError, match="at least one row"):
            wrong()
    with pytest.raises(ValueError, match="score='largest' is none of sum, absolute, most"):
        TopRows(1, score="largest")  # type: ignore[arg-type]


def test_reducers_of_a_job(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = TensorDictModule(nn.Linear(3, 2), ["x"], ["y"])
    data = TensorDict({"x": torch.randn(30, 3), "action": torch.randint(2, (30,))}, [30])
    method = LRP("epsilon", target=Target("y", 0))
    reduce = [Moments(by="action"), TopRows(3), Reservoir(4), Histogram(name="sizes")]
    job = Job(method, model, data, tmp_path / "job", chunk=7, reduce=reduce)
    assert job.work().finished
    result = job.result()
    relevance = result.rows["attr", "x"]
    assert set(result.reduced) == {"moments", "toprows", "reservoir", "sizes"}
    torch.testing.assert_close(
        result.reduced["moments"]["mean"][1], relevance[data["action"] == 1].double().mean(0)
    )
    assert result.reduced["toprows"]["row"].tolist() == relevance.sum(-1).double().topk(3).indices.tolist()
    drawn = result.reduced["reservoir"]
    assert torch.equal(drawn["relevance"], relevance[drawn["row"]])
    for wrong in (["moments"], Moments()):
        with pytest.raises(TypeError, match=r"reduce is a list of reducers, like \[Moments\(\)\], got"):
            Job(method, model, data, tmp_path / "no list", reduce=wrong)
    with pytest.raises(ValueError, match="two reducers are called 'moments'"):
        Job(method, model, data, tmp_path / "twice", reduce=[Moments(), Moments(by="action")])
