"""Approximated effects beside patched ones, in one call."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console
from tensordict import TensorDict
from torch import nn

from tdhook import LRP, Target
from tdhook.attribution import Gradient, Patching
from tdhook.evaluation import compare_effects

TARGET = Target("output", 1)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def two(count: int = 7) -> TensorDict:
    torch.manual_seed(1)
    clean, corrupt = torch.randn(2, count, 4).double()
    sides = {side: TensorDict({"input": x}, [count]) for side, x in (("clean", clean), ("corrupt", corrupt))}
    return TensorDict(sides, [count])


def test_figures_are_those_of_all_parts_of_a_kind() -> None:
    net, td = model(), two()
    methods = {
        "AtP": Patching("atp", TARGET, at=["1", "3"]),
        "LRP": Patching("epsilon", TARGET, at=["1", "3"]),
    }
    found = compare_effects(methods, net, td, kinds={"all": ["1", "3"], "last": ["3"]})
    assert [(row.method, row.kind) for row in found.rows] == [
        ("AtP", "all"), ("AtP", "last"), ("LRP", "all"), ("LRP", "last"),
    ]  # fmt: skip
    exact = Patching("exact", TARGET, at=["1", "3"]).wrap(net)(td.clone())["attr"]
    atp = methods["AtP"].wrap(net)(td.clone())["attr"]
    a, b = (torch.cat([one["1"].flatten(), one["3"].flatten()]) for one in (atp, exact))
    row = found.of("AtP", "all")
    assert row.parts == 7 * 11
    assert row.pearson == pytest.approx(float(torch.corrcoef(torch.stack([a, b]))[0, 1]))
    assert row.sign == pytest.approx(float((a.sign() == b.sign()).double().mean()))
    assert row.slope == pytest.approx(float((a * b).sum() / (a * a).sum()))
    # Behind the last place the model is linear.
    last = found.of("AtP", "last")
    assert (
        last.pearson == pytest.approx(1)
        and last.spearman == pytest.approx(1)
        and last.slope == pytest.approx(1)
    )
    torch.testing.assert_close(found.exact["1"], exact["1"])
    assert found.approximated["LRP"].keys() == found.exact.keys() == {"1", "3"}
    assert set(found.seconds) == {"AtP", "LRP", "exact"} and td.keys() == two().keys()


def test_edges_and_parts_that_do_not_differ() -> None:
    net, td = model(), two()
    td["corrupt", "input"][:, 0] = td["clean", "input"][:, 0]
    found = compare_effects({"AtP": Patching("atp", TARGET, at="input", edges=[("1", "2:input")])}, net, td)
    assert [row.kind for row in found.rows] == ["input", "1 -> 2:input"]
    assert found.of("AtP", "input").parts == 7 * 3
    by_pair = compare_effects(
        {"AtP": Patching("atp", TARGET, edges=[("1", "2:input")])},
        net,
        td,
        kinds={"edge": [("1", "2:input")]},
    )
    assert by_pair.of("AtP", "edge").pearson == pytest.approx(found.rows[1].pearson)


def test_a_table_is_printed() -> None:
    found = compare_effects({"AtP": Patching("atp", TARGET, at="3", axis=())}, model(), two())
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(found.table())
    text = console.export_text()
    assert "Pearson" in text and "AtP" in text and "1.000" in text


def test_what_cannot_be_compared() -> None:
    net, td = model(), two()
    with pytest.raises(ValueError, match="no effects are compared: give methods by name"):
        compare_effects({}, net, td)
    other = {"a": Patching(Gradient(TARGET), at="1"), "b": Patching(LRP("epsilon", target=TARGET), at="3")}
    with pytest.raises(ValueError, match=r"'b' patches .* and 'a' .*: compare methods that patch the same"):
        compare_effects(other, net, td)
    with pytest.raises(KeyError, match="'last' names '9', where nothing is patched; there are '1'"):
        compare_effects({"a": other["a"]}, net, td, kinds={"last": ["9"]})
    with pytest.raises(KeyError, match=r"no effects were compared of \('a', 'b'\); there are \('a', '1'\)"):
        compare_effects({"a": other["a"]}, net, td).of("a", "b")
