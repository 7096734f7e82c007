"""The measurements of faithfulness: Shapley values of games whose answers are known, and the page of the results."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # where `benchmarks` is that of this repository; torchrl installs one, too

from benchmarks.faithfulness.games import Game, all_coalitions, occlusions, permutations  # noqa: E402
from benchmarks.faithfulness.page import (  # noqa: E402
    PAGE,
    joined,
    mean_area,
    page,
    read,
    summary,
    unmeasured,
    write,
)
from tdhook.passes.questions import asked  # noqa: E402
from tdhook.perturbing.features import Features, Groups  # noqa: E402
from tdhook.targets import Target  # noqa: E402


def product(x: torch.Tensor) -> torch.Tensor:
    """``x0 x1 + 3 x2``, which is played for: the product is shared, the rest is that of one."""
    return (x[:, :1] * x[:, 1:2] + 3 * x[:, 2:]).clone()


def game(groups: Groups = None) -> tuple[Game, dict[object, torch.Tensor]]:
    td = TensorDict({"x": torch.tensor([[2.0, 4.0, 1.0], [1.0, -2.0, 0.5]])}, [2])
    module = TensorDictModule(product, ["x"], ["y"])
    question, rows = asked(module, td, Target("y"), 1, 16)
    return Game(question, rows, Features.of(rows, ["x"], groups), at_once=3), {"x": torch.zeros(2, 3)}


def test_all_coalitions_give_shapley_values() -> None:
    of, reference = game()
    shares = of.shares([all_coalitions(3)], [reference])
    torch.testing.assert_close(shares, torch.tensor([[4.0, 4.0, 3.0], [-1.0, -1.0, 1.5]]).double())
    torch.testing.assert_close(of.as_relevance(shares)["x"], shares.float())


def test_permutations_give_them_too_and_always_sum_up() -> None:
    of, reference = game()
    drawn = permutations(3, 2, torch.Generator().manual_seed(0))  # forth and back: exact for pairs
    torch.testing.assert_close(of.shares([drawn], [reference]), of.shares([all_coalitions(3)], [reference]))
    odd = of.shares([permutations(3, 5, torch.Generator().manual_seed(1))], [reference])
    torch.testing.assert_close(odd.sum(1), torch.tensor([11.0, -0.5]).double())


def test_occlusion_is_what_each_is_worth_last() -> None:
    of, reference = game()
    shares = of.shares([occlusions(3)], [reference])
    torch.testing.assert_close(shares, torch.tensor([[8.0, 8.0, 3.0], [-2.0, -2.0, 1.5]]).double())


def test_groups_play_together_and_share_evenly() -> None:
    of, reference = game(torch.tensor([0, 0, 1]))
    shares = of.shares([all_coalitions(2)] * 2, [reference, reference])
    torch.testing.assert_close(shares, torch.tensor([[8.0, 3.0], [-2.0, 1.5]]).double())
    expected = torch.tensor([[4.0, 4.0, 3.0], [-1.0, -1.0, 1.5]])
    torch.testing.assert_close(of.as_relevance(shares)["x"], expected)


def test_the_page_belongs_to_the_results() -> None:
    assert PAGE.read_text() == page(read()), "run `nox -s faithfulness -- --page`"


def test_what_has_no_results_is_named() -> None:
    rows = read()
    assert len(rows) > 8 and "demo" in {row["name"] for row in rows}
    assert "recurrent" in unmeasured([row for row in rows if row["name"] != "recurrent"])
    assert ("Without results so far" in PAGE.read_text()) == bool(unmeasured(rows))


def method(name: str, baseline: str | None, family: str, cost: float, area: float) -> dict[str, object]:
    label = name if baseline is None else f"{name}, against {baseline}"
    return {
        "method": name,
        "baseline": baseline,
        "label": label,
        "family": family,
        "cost": cost,
        "area": {"zero": [area, area], "mean": [area + 1, area + 1]},
    }


def test_a_summary_names_the_best_that_costs_no_more(tmp_path: Path) -> None:
    methods = [
        method("epsilon", None, "lrp", 1.0, 0.5),
        method("deeplift_shapley", "mean", "lrp", 2.0, 3.5),
        method("integrated gradients", "mean", "gradient", 32.0, 3.0),
        method("gradient x input", None, "gradient", 1.0, 1.0),
        method("Shapley values", "mean", "removal", 9.0, 3.0),
        method("Shapley values", "zero", "removal", 9.0, 4.5),
    ]
    subject = {"name": "toy", "kind": "vector", "what": "Toy", "features": 3, "rows": 4, "seeds": 2}
    write({**subject, "methods": methods}, ["toy"], tmp_path / "found" / "models.json")
    (row,) = read(tmp_path / "found" / "models.json")
    found = summary(row)
    assert (found["without"]["method"], found["rival"]["method"]) == ("epsilon", "gradient x input")
    assert (found["shapley"]["baseline"], found["best"]["baseline"]) == ("mean", "zero")
    assert mean_area(found["recommended"]) == 4.0
    text = page([row])
    assert (
        "| `toy` | deeplift_shapley, against mean | 2 | 4 | epsilon: 1 | gradient x input: 1.5 | 114 % | 80 % |"
        in text
    )


def test_some_methods_are_measured_beside_the_others() -> None:
    known = {"name": "toy", "features": 3, "rows": 4, "seeds": 2}
    before = {
        **known,
        "methods": [method("gradient", None, "gradient", 1.0, 1.0), method("a", "mean", "lrp", 2.0, 1.0)],
    }
    later = {
        **known,
        "methods": [method("gradient", None, "gradient", 9.0, 9.0), method("b", "mean", "lrp", 2.0, 3.0)],
    }
    order = ["b, against mean", "gradient", "a, against mean"]
    found = joined(before, later, ["b"], order)
    assert [each["label"] for each in found["methods"]] == order
    assert [each["cost"] for each in found["methods"]] == [2.0, 1.0, 2.0]
    with pytest.raises(
        ValueError, match="toy was measured with 2 seeds, and now with 5: leave out --methods"
    ):
        joined(before, {**later, "seeds": 5}, ["b"], order)


def test_chance_is_worth_nothing_and_shapley_values_more_than_the_gradient() -> None:
    """On every subject: else the measure would say nothing."""
    for row in read():
        areas = {each["label"]: mean_area(each) for each in row["methods"]}
        best = max(areas.values())
        assert abs(areas["random"]) < 0.25 * best, row["name"]
        assert areas["gradient"] < best, row["name"]


def test_what_the_page_says_of_pictures() -> None:
    rows = {row["name"]: summary(row) for row in read() if row["kind"] == "pixels"}
    for found in rows.values():
        assert mean_area(found["recommended"]) > max(mean_area(found["without"]), mean_area(found["rival"]))
    pretrained = rows["efficientnet"]
    assert mean_area(pretrained["recommended"]) > 1.6 * mean_area(pretrained["without"])


@pytest.mark.parametrize("row", read(), ids=lambda row: row["name"])
def test_results_are_whole(row: dict[str, object]) -> None:
    for each in row["methods"]:
        assert each["cost"] >= 0 and all(len(seeds) == row["seeds"] for seeds in each["area"].values())
