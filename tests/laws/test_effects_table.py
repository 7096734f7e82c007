"""The tables of effects on their page, and what they are measured on."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict
from torch import nn

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # where `benchmarks` is that of this repository; torchrl installs one, too

from benchmarks.effects.__main__ import KINDS, METHODS, PAGE, RESULTS, measure, tables, written  # noqa: E402
from benchmarks.effects.subjects import Subject  # noqa: E402


def report() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RESULTS.read_text())
    return found


def test_the_page_belongs_to_the_results() -> None:
    page = PAGE.read_text()
    assert page == written(page, report()), "run `nox -s effects -- --page`"


def test_every_method_is_measured_on_every_subject_in_both_directions() -> None:
    measured = report()["measured"]
    assert len({(one["subject"], one["patch"]) for one in measured}) == len(measured) == 8
    for one in measured:
        assert {(row["method"], row["kind"]) for row in one["rows"]} == {
            (m, k) for m in METHODS for k in KINDS
        }
        assert set(one["passes"]) == {*METHODS, "exact"}


def test_what_the_page_says_of_relp_is_so() -> None:
    """At least 0.95 for each kind of component of the language policy, in both directions."""
    for one in report()["measured"]:
        if one["subject"] == "language policy":
            assert all(row["pearson"] >= 0.95 for row in one["rows"] if row["method"] == "RelP: relp")


def test_what_the_page_says_of_effects_by_share_is_so() -> None:
    """At least 0.97 on each model but where all steps are others, and for MLPs of MiniLM from its clean side."""
    for one in report()["measured"]:
        if one["subject"] != "Decision Transformer, other window":
            found = {
                r["kind"]: r["pearson"] for r in one["rows"] if r["method"] == "RelP: deeplift, by share"
            }
            if one["subject"] == "MiniLM" and one["patch"] == "corrupt":
                assert found.pop("MLP") >= 0.86
            assert min(found.values()) >= 0.97


def test_a_subject_is_measured() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.GELU(), nn.Linear(4, 1), nn.Flatten(0))
    sides = {side: TensorDict({"x": torch.randn(5, 3)}, [5]) for side in ("clean", "corrupt")}
    kinds = {key: ["0"] for key in KINDS}
    found = measure(Subject("toy", "a toy", model, TensorDict(sides, [5]), ["x"], kinds), "clean")
    text = tables({"machine": {"date": "", "torch": "", "cpu": "", "threads": 1}, "measured": [found]})
    assert (
        "### toy, clean into corrupt" in text
        and "| RelP: relp |" in text
        and "| exact | 1 | 1 | 1 | 4 + 0 |" in text
    )
