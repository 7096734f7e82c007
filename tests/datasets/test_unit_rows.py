"""Lists and averages of units are those of all steps at once, bit by bit, in any order and any parts."""

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
from tdhook.concepts import Found
from tdhook.datasets import Job, UnitRows, open_result
from tdhook.datasets.reducing import Piece


def piece(values: Tensor, begin: int = 0, **entries: Tensor) -> Piece:
    batch = next(iter(entries.values())).shape[:1] if entries else values.shape[:1]
    data = TensorDict(dict(entries), batch)
    return Piece(data, torch.arange(begin, begin + len(values)), {"layer": values}, {})


def example(seed: int = 0, rows: int = 60) -> tuple[Tensor, Tensor]:
    """Values of six units with 2 x 2 places, a third of them zero, and labels."""
    torch.manual_seed(seed)
    values = torch.randn(rows, 6, 2, 2) * torch.randn(rows, 1, 1, 1).exp()
    values[torch.rand(rows, 6) < 0.33] = 0
    return values, torch.randint(3, (rows,))


@pytest.mark.parametrize("options", [{}, {"pooled": "max"}, {"share": True}, {"against": True}])
@given(st.lists(st.integers(0, 60), max_size=6), st.integers(0, 5), st.randoms())
def test_neither_cuts_nor_order_make_a_difference(
    options: dict[str, object], ends: list[int], seed: int, chance: object
) -> None:
    values, labels = example(seed)
    reducer = UnitRows(5, "layer", axis=1, by="action", **options)  # type: ignore[arg-type]
    whole = reducer.part(piece(values, action=labels))
    edges = sorted({0, 60, *ends})
    parts = [reducer.part(piece(values[a:b], a, action=labels[a:b])) for a, b in pairwise(edges)]
    chance.shuffle(parts)  # type: ignore[attr-defined]
    found = reducer.merged(parts)
    assert found.keys() == whole.keys()
    for name, value in whole.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("pooled", ["sum", "max"])
def test_lists_and_averages_are_those_of_each_unit_and_group(pooled: str) -> None:
    values, labels = example()
    reducer = UnitRows(4, "layer", axis=1, pooled=pooled, against=True, by="action")  # type: ignore[arg-type]
    found = reducer.result(reducer.part(piece(values, action=labels)))
    flat = values.double().flatten(2)
    amounts = flat.sum(-1) if pooled == "sum" else flat.amax(-1)
    assert found["places"].tolist() == [2, 2] and found["group"].tolist() == [0, 1, 2]
    for g in range(3):
        rows = (labels == g).nonzero()[:, 0].tolist()
        torch.testing.assert_close(found["mean"][g], amounts[rows].mean(0))
        torch.testing.assert_close(found["absolute"][g], amounts[rows].abs().mean(0))
        assert found["count"][g] == len(rows)
        for unit in range(6):
            for side, sign in enumerate((1, -1)):
                of_side = flat.amin(-1) if pooled == "max" and side else amounts
                ordered = sorted(rows, key=lambda i: (-sign * float(of_side[i, unit]), i))[:4]
                assert found["row"][g, side, unit].tolist() == ordered
                assert torch.equal(found["amount"][g, side, unit], of_side[ordered, unit])
                where = flat[ordered, unit]
                place = where.argmax(-1) if side == 0 else where.argmin(-1)
                assert torch.equal(found["position"][g, side, unit], place)


def test_lists_that_are_not_full_are_as_wide_as_the_longest_however_they_were_cut() -> None:
    values, _ = example(rows=20)
    labels = torch.tensor([0] * 8 + [1] * 3 + [0] * 4 + [1] * 5)
    reducer = UnitRows(30, "layer", axis=1, by="action")
    whole = reducer.part(piece(values, action=labels))
    parts = [reducer.part(piece(values[a:b], a, action=labels[a:b])) for a, b in ((11, 20), (0, 11))]
    found = reducer.merged(parts)
    assert whole["row"].shape[-1] == 12
    for name, value in whole.items():
        assert torch.equal(found[name], value), name


def test_the_best_of_all_groups_are_all_that_are_listed_where_no_list_left_any_out() -> None:
    values, labels = example()
    amounts = values.double().flatten(2).sum(-1)
    for count, listed in ((5, 5), (60, 60)):
        reducer = UnitRows(count, "layer", axis=1, by="action")
        found = Found(reducer.result(reducer.part(piece(values, action=labels))))
        for unit in range(6):
            ordered = torch.sort(amounts[:, unit], descending=True, stable=True).indices[:listed]
            assert torch.equal(found.best(unit)["row"], ordered)


def test_where_there_are_fewer_steps_than_are_listed() -> None:
    values, _ = example(rows=5)
    labels = torch.tensor([0, 0, 0, 2, 0])
    reducer = UnitRows(9, "layer", axis=1, against=True, by="action")
    found = reducer.result(reducer.part(piece(values, action=labels)))
    assert found["row"].shape == (2, 2, 6, 4)
    assert (found["row"][1, :, :, 1:] == -1).all() and (found["row"][1, :, :, 0] == 3).all()
    assert found["amount"][1, 0, :, 1:].eq(-torch.inf).all()
    assert found["amount"][1, 1, :, 1:].eq(torch.inf).all()


def test_shares_of_a_step_have_sizes_that_sum_to_one() -> None:
    values, _ = example()
    values[7] = 0
    reducer = UnitRows(60, "layer", axis=1, share=True)
    found = reducer.result(reducer.part(piece(values)))
    amounts = values.double().sum((-1, -2))
    whole = amounts.abs().sum(-1, keepdim=True)
    expected = torch.where(whole > 0, amounts / whole, 0.0)
    by_row = torch.zeros(60, 6, dtype=torch.float64)
    for unit in range(6):
        by_row[found["row"][0, 0, unit], unit] = found["amount"][0, 0, unit]
    torch.testing.assert_close(by_row, expected)


def test_heads_are_equal_parts_side_by_side() -> None:
    torch.manual_seed(0)
    values = torch.randn(8, 3, 6)  # tokens, width
    reducer = UnitRows(1, "layer", axis=-1, heads=2)
    found = reducer.result(reducer.part(piece(values)))
    parts = values.double().unflatten(-1, (2, 3)).movedim(2, 1).flatten(2)
    torch.testing.assert_close(found["mean"][0], parts.sum(-1).mean(0))
    assert found["places"].tolist() == [3, 3]
    best = parts.sum(-1).argmax(0)
    assert found["row"][0, 0, :, 0].tolist() == best.tolist()
    assert found["position"][0, 0, :, 0].tolist() == [int(parts[best[i], i].argmax()) for i in range(2)]


def test_steps_of_trajectories_and_padding() -> None:
    torch.manual_seed(0)
    values = torch.randn(4, 5, 3)
    mask = torch.ones(4, 5, 1, dtype=torch.bool)
    mask[1, 3:] = False
    action = torch.randint(2, (4, 5))
    data = TensorDict(
        {"action": action, ("collector", "mask"): mask, "step_count": torch.arange(20).reshape(4, 5, 1)},
        [4, 5],
    )
    rows = torch.tensor([7, 2, 9, 4])
    reducer = UnitRows(3, "layer", by="action")
    found = reducer.result(reducer.part(Piece(data, rows, {"layer": values}, {})))
    assert int(found["count"].sum()) == 18
    for g in range(2):
        for unit in range(3):
            steps = [(i, t) for i in range(4) for t in range(5) if mask[i, t] and action[i, t] == g]
            ordered = sorted(steps, key=lambda at: -float(values[at[0], at[1], unit]))[:3]
            listed = zip(found["row"][g, 0, unit].tolist(), found["step"][g, 0, unit].tolist(), strict=True)
            assert list(listed) == [(int(rows[i]), t) for i, t in ordered]
            assert found["note:step_count"][g, 0, unit].tolist() == [5 * i + t for i, t in ordered]


def test_a_piece_that_is_all_padding_adds_nothing() -> None:
    torch.manual_seed(0)
    mask = torch.ones(4, 5, dtype=torch.bool)
    mask[2:] = False
    entries = {"action": torch.randint(2, (4, 5)), ("collector", "mask"): mask}
    data = TensorDict({**entries, "step_count": torch.arange(20).reshape(4, 5)}, [4, 5])
    values, rows = torch.randn(4, 5, 3), torch.arange(4)
    reducer = UnitRows(3, "layer", by="action")
    whole, *parts = (
        reducer.part(Piece(data[some], rows[some], {"layer": values[some]}, {}))
        for some in (slice(4), slice(2), slice(2, 4))
    )
    for found in (reducer.merged(parts), reducer.merged(reversed(parts))):
        assert found.keys() == whole.keys() and all(torch.equal(found[name], whole[name]) for name in whole)


def test_notes_are_those_that_are_there_or_named() -> None:
    values, _ = example(rows=6)
    score = torch.randn(6, 1)
    data = TensorDict({"score": score, ("next", "reward"): score * 2, "pixels": torch.zeros(6, 2)}, [6])
    of = Piece(data, torch.arange(6), {"layer": values}, {})
    by_itself = UnitRows(2, axis=1)
    found = by_itself.result(by_itself.part(of))
    assert [name for name in found if name.startswith("note")] == ["note:next:reward"]
    rows = found["row"][0, 0]
    assert torch.equal(found["note:next:reward"][0, 0], 2 * score[rows, 0].double())
    named = UnitRows(2, axis=1, notes=["score"])
    assert "note:score" in named.part(of) and named.reads == ["score"]
    for key, shape in (("nothing", ""), ("pixels", r" of shape \(2,\)")):
        with pytest.raises(
            KeyError, match=f"'{key}'{shape} is no number of each step to be noted; there are"
        ):
            UnitRows(2, axis=1, notes=[key]).part(of)


def test_a_step_is_counted_once() -> None:
    values, _ = example()
    reducer = UnitRows(4, "layer", axis=1)
    part = reducer.part(piece(values[:30], 0))
    with pytest.raises(ValueError, match=r"row \d+ is in both parts: a row is counted once"):
        reducer.merged([part, reducer.part(piece(values[29:], 29))])


def test_what_makes_no_sense_is_refused() -> None:
    values, _ = example(rows=4)
    with pytest.raises(
        ValueError,
        match=r"'layer' has the axes \['batch', 6, 2, 2\]: say along which its units lie, axis=1 to 3",
    ):
        UnitRows(1, "layer").part(piece(values))
    with pytest.raises(IndexError, match="axis=4 is no axis of units of 'layer'"):
        UnitRows(1, "layer", axis=4).part(piece(values))
    with pytest.raises(IndexError, match="axis=-4 is no axis of units of 'layer'"):
        UnitRows(1, "layer", axis=-4).part(piece(values))
    with pytest.raises(ValueError, match="the axis of 6 of 'layer' does not consist of 4 equal heads"):
        UnitRows(1, "layer", axis=1, heads=4).part(piece(values))
    with pytest.raises(ValueError, match="axis=0 is that of the batch"):
        UnitRows(1, "layer", axis=0)
    with pytest.raises(ValueError, match="pooled='mean' is neither 'sum' nor 'max'"):
        UnitRows(1, pooled="mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="of='values' is neither 'relevance' nor 'value'"):
        UnitRows(1, of="values")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="of='value' looks at the values of a layer: name it, key="):
        UnitRows(1, of="value")
    with pytest.raises(ValueError, match="at least one row is kept, got count=0"):
        UnitRows(0)
    values[2, 1, 0, 1] = torch.nan
    with pytest.raises(ValueError, match="'layer' is not finite in row 12"):
        UnitRows(1, "layer", axis=1).part(piece(values, 10))
    reducer = UnitRows(1, "layer", axis=1)
    parts = [reducer.part(piece(torch.ones(1, 6, n, 2), n)) for n in (2, 3)]
    with pytest.raises(ValueError, match="'layer' has other axes in some of the rows"):
        reducer.merged(parts)
    noted = [
        reducer.part(piece(torch.ones(1, 6, 2, 2), 1, **notes))
        for notes in ({}, {"step_count": torch.ones(1)})
    ]
    with pytest.raises(ValueError, match=r"some of the rows have note:step_count and others have not"):
        reducer.merged(noted)


def test_relevance_of_several_outputs_is_refused_and_values_have_to_be_asked_for() -> None:
    several = Piece(
        TensorDict({}, [4]), torch.arange(4), {"h": torch.ones(4, 2, 3)}, {("value", "h"): torch.ones(4, 3)}
    )
    with pytest.raises(ValueError, match="relevance of 'h' is that of 2 outputs, each explained for itself"):
        UnitRows(1, "h", axis=1).part(several)
    with pytest.raises(KeyError, match=r"the method writes no values of 'g': give it values=\['g'\]"):
        UnitRows(1, "g", of="value").part(several)


def test_relevance_and_values_of_a_job(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    data = TensorDict({"x": torch.randn(40, 3), "action": torch.randint(2, (40,))}, [40])
    method = LRP("epsilon", target=Target("y", "action"), input_modules=["1"], values=["1"])
    reduce = [UnitRows(3, "1", by="action"), UnitRows(3, "1", of="value", name="values")]
    job = Job(
        method, TensorDictModule(net, ["x"], ["y"]), data, tmp_path / "job", chunk=7, keep=None, reduce=reduce
    )
    assert job.work().finished
    found = open_result(tmp_path / "job").reduced
    hidden = net[:2](data["x"]).double()
    assert found["values"]["row"][0, 0].tolist() == hidden.topk(3, 0).indices.T.tolist()
    relevance = hidden * net[2].weight[data["action"]].double()
    for g in range(2):
        mine = data["action"] == g
        torch.testing.assert_close(
            found["unitrows"]["mean"][g], relevance[mine].mean(0), rtol=1e-5, atol=1e-6
        )
