"""Every actor, critic, network and world model of torchrl.modules: all relevance arrives, and nothing else changes."""

from __future__ import annotations

import importlib.util

import pytest

pytest.importorskip("torchrl")

import torchrl.modules
import torchrl.modules.models

from . import (
    torchrl_actors,
    torchrl_agents,
    torchrl_networks,
    torchrl_operators,
    torchrl_recurrent,
    torchrl_transformers,
    torchrl_worlds,
)
from .torchrl_names import NO_MODEL, NOT_HERE

SOURCES = (
    torchrl_networks,
    torchrl_agents,
    torchrl_actors,
    torchrl_operators,
    torchrl_recurrent,
    torchrl_worlds,
    torchrl_transformers,
)
CASES = {name: case for source in SOURCES for name, case in source.CASES.items()}
COVERED = {name for case in CASES.values() for name in case.covers}
EXPORTED = {*torchrl.modules.__all__, *torchrl.modules.models.__all__}


def missing(case) -> list[str]:
    return [package for package in case.needs if importlib.util.find_spec(package) is None]


def parameters(every=1):
    for number, (name, case) in enumerate(CASES.items()):
        marks = [pytest.mark.xfail(strict=True, reason=case.fails)] if case.fails else []
        if case.slow or number % every:
            marks.append(pytest.mark.slow)
        if missing(case):
            marks.append(pytest.mark.skip(reason=f"needs {', '.join(missing(case))}"))
        yield pytest.param(case, id=name, marks=marks)


# torch compiles a scan, and looks there for the gradients of what it is given.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("case", list(parameters()))
def test_all_relevance_is_accounted_for(case):
    case.check()


# Where another action is chosen on the baseline, the one chosen on the input is explained, and that is told.
@pytest.mark.filterwarnings("ignore:the model does something else on the reference")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("case", list(parameters(every=4)))
def test_all_of_a_difference_arrives(case):
    case.check_difference()


# --- Nothing is left out --------------------------------------------------------------------------


def test_cases_have_names_of_their_own():
    assert len(CASES) == sum(len(source.CASES) for source in SOURCES)


def test_every_name_has_a_case_or_a_reason():
    unknown = EXPORTED - COVERED - NO_MODEL.keys() - NOT_HERE.keys()
    assert not unknown, f"neither a case nor a reason for {sorted(unknown)}"


def test_no_name_has_both_a_case_and_a_reason():
    assert not COVERED & (NO_MODEL.keys() | NOT_HERE.keys())
    assert not NO_MODEL.keys() & NOT_HERE.keys()


def test_no_name_is_out_of_date():
    beyond = {"LazygSDEModule", "gSDEModule"}  # of torchrl.modules.models.exploration
    gone = (COVERED | NO_MODEL.keys() | NOT_HERE.keys()) - EXPORTED - beyond
    assert not gone, f"torchrl.modules has no {sorted(gone)}"


def test_how_much_is_covered():
    """These numbers change together with what is covered."""
    assert (len(COVERED), len(CASES), len(NO_MODEL)) == (110, 173, 30)


def test_what_is_skipped():
    assert NOT_HERE == {"GPWorldModel": "needs botorch and gpytorch"}
    assert {name: case.needs for name, case in CASES.items() if case.needs} == dict.fromkeys(
        (
            "DTActor",
            "DecisionTransformer",
            "DecisionTransformerInferenceWrapper",
            "GPT2RewardModel",
            "LMHeadActorValueOperator",
            "OnlineDTActor, its loc",
            "OnlineDTActor, its scale",
        ),
        ("transformers",),
    )


def test_what_fails():
    assert not [name for name, case in CASES.items() if case.fails]
