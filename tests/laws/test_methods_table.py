"""The table of methods: ranks, resumption, and the page of the results."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import nn

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # where `benchmarks` is that of this repository; torchrl installs one, too

from benchmarks.faithfulness.subjects import Subject  # noqa: E402
from benchmarks.methods import measuring  # noqa: E402
from benchmarks.methods.measures import MEASURES, Measured  # noqa: E402
from benchmarks.methods.methods import CHANCE, METHODS, Tried, reference  # noqa: E402
from benchmarks.methods.page import PAGE, disagreement, page, ranks, read, values, write  # noqa: E402
from tdhook.attribution import Gradient  # noqa: E402
from tdhook.targets import Target  # noqa: E402

OF_PICTURES = ("blur integrated gradients", "RISE", "perturbation saliency", "SARFA")


def subject() -> Subject:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))

    def draw(seed: int) -> TensorDictBase:
        chance = torch.Generator().manual_seed(seed)
        return TensorDict({"observation": torch.randn(8, 4, generator=chance)}, [8])

    model = TensorDictModule(net, ["observation"], ["logits"])
    return Subject("toy", "A toy", "vector", model, Target("logits", "argmax"), draw)


def row(**methods: list[dict[str, Any]]) -> dict[str, Any]:
    cells = {name.replace("_", " "): {"cost": 2.0, "seeds": seeds} for name, seeds in methods.items()}
    return {"name": "toy", "what": "A toy", "kind": "vector", "features": 4, "rows": 8, "methods": cells}


def test_the_page_belongs_to_the_results() -> None:
    assert PAGE.read_text() == page(read()), "run `nox -s methods -- --page`"


def test_ranks_look_at_the_direction_and_share_places() -> None:
    found = row(
        gradient=[{"curves": 1.0, "noise": 1.0}],
        gradient_x_input=[{"curves": 3.0, "noise": 3.0}],
        epsilon=[{"curves": 2.0, "noise": 1.0}, {"curves": 4.0, "noise": 1.0}],
        deconvnet=[{"curves": None, "noise": 9.0}],
    )
    assert ranks(found, "curves") == {"gradient": 3.0, "gradient x input": 1.5, "epsilon": 1.5}
    assert ranks(found, "noise") == {
        "gradient": 1.5,
        "gradient x input": 3.0,
        "epsilon": 1.5,
        "deconvnet": 4.0,
    }
    assert values(found, "curves")["epsilon"] == [2.0, 4.0]
    # Of three methods, one pair is in opposite order, and each measure has a pair of equals.
    assert disagreement([found], "curves", "noise") == pytest.approx(-1 / 2)
    assert disagreement([found], "curves", "ROAD") is None


def test_the_page_says_what_wins_and_what_loses() -> None:
    def seeds(*figures: float) -> list[dict[str, float]]:
        return [{"curves": figure, "sums": figure / 10, "noise": figure} for figure in figures]

    found = row(
        gradient=seeds(0.1, 0.3),
        gradient_x_input=seeds(2.0, 3.0),
        epsilon=seeds(4.0, 6.0),
        random_map=seeds(0.5, 0.7),
    )
    found["methods"]["epsilon"]["cost"] = 9.0
    found["methods"]["deeplift"] = {"seeds": [], "failed": "ValueError: not for this"}
    text = page([found])
    assert "- **epsilon** is the most faithful by these measures, and the best on 1 of 1 subjects" in text
    assert "- Of what costs no more than two gradients, **gradient x input** is." in text
    assert "- Better than chance on no more than half of the subjects: gradient (0 of 1)." in text
    assert (
        "(Kendall's rank correlation 1.00 on average); what else there is to say does not follow it (-1.00)"
        in text
    )
    assert "| epsilon | 9 | **5** ± 12.7 | **0.5** ± 1.27 | 5 ± 12.7 |" in text
    assert "| gradient x input | 2 | 2.0 |  |  | 2.0 |" in text
    assert "- deeplift, on A toy: ValueError: not for this" in text


def test_what_is_there_is_not_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, int]] = []

    def counted(case: Any) -> torch.Tensor:
        calls.append((type(case.method).__name__, case.seed))
        return torch.full((8,), 2.0 + case.seed)

    def fails(case: Any) -> torch.Tensor:
        raise RuntimeError("no such thing")

    monkeypatch.setattr(measuring, "MEASURES", {"one": Measured(counted, True, True, "")})
    kept: list[dict[str, Any]] = []
    names = ["gradient", "gradient x input"]
    found = measuring.measure(subject(), {}, 1, names, lambda each: kept.append(each))
    assert calls == [("Gradient", 0), ("GradientTimesInput", 0)] and len(kept) == 3
    assert (
        found["methods"]["gradient"]["seeds"] == [{"one": 2.0}] and found["methods"]["gradient"]["cost"] > 0
    )
    assert found["agreement"]["methods"] == names
    assert torch.tensor(found["agreement"]["kendall"]).diagonal().tolist() == [1.0, 1.0]
    cost = found["methods"]["gradient"]["cost"]
    calls.clear()
    measuring.measure(subject(), found, 2, [*names, CHANCE], lambda _: None)  # a seed and a method more
    assert calls == [("RandomMap", 0), ("Gradient", 1), ("GradientTimesInput", 1), ("RandomMap", 1)]
    assert found["methods"]["gradient"]["cost"] == cost
    assert found["agreement"]["methods"] == [*names, CHANCE]
    monkeypatch.setitem(measuring.MEASURES, "two", Measured(lambda _: None, True, True, ""))
    calls.clear()
    measuring.measure(subject(), found, 2, names, lambda _: None)
    assert not calls and found["methods"]["gradient"]["seeds"][1] == {"one": 3.0, "two": None}
    monkeypatch.setitem(measuring.MEASURES, "three", Measured(fails, True, True, ""))
    measuring.measure(subject(), found, 1, ["gradient"], lambda _: None)
    assert found["methods"]["gradient"]["failed"] == "RuntimeError: no such thing"
    assert found["methods"]["gradient"]["seeds"][0] == {"one": 2.0, "two": None}


def test_a_method_may_not_be_for_a_subject(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "METHODS", {**METHODS, "maps": Tried(lambda _: None)})
    monkeypatch.setattr(measuring, "MEASURES", {"one": Measured(lambda _: torch.ones(8), True, True, "")})
    found = measuring.measure(subject(), {}, 1, ["maps", "gradient"], lambda _: None)
    assert found["methods"]["maps"] == {"seeds": []} and "agreement" not in found


@pytest.mark.parametrize("name", METHODS)
def test_each_method_is_measured_by_all_measures(name: str, tmp_path: Path) -> None:
    found = measuring.measure(subject(), {}, 1, [name, CHANCE], lambda each: write(each, tmp_path))
    if METHODS[name].make(subject()) is None:
        assert ("CAM" in name or name in OF_PICTURES) and found["methods"][name] == {"seeds": []}
        return
    (seed,) = found["methods"][name]["seeds"]
    assert list(seed) == list(MEASURES)
    assert {each for each, value in seed.items() if value is None} == {"ROAD", "located"}
    (read_again,) = read(tmp_path)
    text = page([read_again])
    assert f"| {name} | " in text and "### A toy" in text and "What could not be explained" not in text
    assert [file.name for file in tmp_path.iterdir()] == ["toy.json"]


def test_what_is_known_to_matter_is_looked_for() -> None:
    of = subject()
    truth = torch.tensor([True, False, False, False]).expand(8, 4)

    def draw(seed: int) -> TensorDictBase:
        return of.draw(seed).update({"truth": TensorDict({"observation": truth}, [8])})

    known = replace(of, draw=draw)
    found = measuring.measure(known, {}, 1, ["gradient"], lambda _: None)
    relevance = Gradient(of.target).wrap(of.model)(of.draw(0))["attr", "observation"]
    share = (relevance[:, 0] / relevance.sum(1)).mean().item()
    assert found["methods"]["gradient"]["seeds"][0]["located"] == pytest.approx(share)


def test_the_reference_is_one_that_inputs_could_nearly_have() -> None:
    assert reference(subject()) == ("mean", "mean")
    assert isinstance(METHODS["gradient"].make(subject()), Gradient) and not METHODS["gradient"].multiplied
