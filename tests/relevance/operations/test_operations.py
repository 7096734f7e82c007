"""Every operation of the table, in every form it can be written in, conserves and gives the same."""

from __future__ import annotations

import pytest
import torch

from tdhook.relevance.operations.table import OPERATIONS

from .cases import Case, inputs
from .checks import FLOWS, Calls, assert_balanced, assert_same, every_flow, explained, operations_in, plainly
from .elementwise import elementwise_cases
from .fused import other_cases
from .layers import layer_cases
from .moves import moves_cases
from .products import product_cases
from .selections import selection_cases
from .sums import affine_cases
from .winners import winner_cases

CASES = [
    *elementwise_cases(),
    *moves_cases(),
    *selection_cases(),
    *winner_cases(),
    *affine_cases(),
    *layer_cases(),
    *product_cases(),
    *other_cases(),
]
NOT_CALLED = {
    "cuda": "needs a GPU",
    "dequantize": "returns no values of a quantised tensor that have a gradient",
    "native_channel_shuffle": "has no derivative in torch; torch.channel_shuffle has",
    "row_stack": "is torch.vstack",
    "swapaxes": "is torch.transpose",
    "one_hot": "takes integers, which have no gradient",
}

pytestmark = [
    pytest.mark.filterwarnings("ignore:index_reduce:UserWarning"),
    pytest.mark.filterwarnings("ignore:Sparse:UserWarning"),
]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)


@every_case
@every_flow
def test_each_form_gives_what_the_first_gives(case: Case, flow: str) -> None:
    """With and without a ledger, which balances."""
    x = inputs(case.domain, case.batch)
    first = None
    for way, form in case.forms.items():
        torch.manual_seed(0)
        model = Calls(form, x, mixing=0.0 if case.domain == "grid" else 0.2).eval()
        expected = plainly(model, x)
        if first is None or flow == "gradient":
            td, module = explained(model, x, flow)
            assert_balanced(td, module, case.tolerance)
            assert torch.equal(td["output"], expected), f"{way}, with a ledger"
            first = td["attr", "input"] if first is None else first
            assert_same(first, td["attr", "input"], case.tolerance)
        td, module = explained(model, x, flow, ledger=False)
        assert torch.equal(td["output"], expected), way
        assert_same(first, td["attr", "input"], case.tolerance)
        assert case.shows is None or case.shows in operations_in(module), way


@every_case
def test_both_flows_agree(case: Case) -> None:
    x = inputs(case.domain, case.batch)
    torch.manual_seed(0)
    model = Calls(next(iter(case.forms.values())), x, mixing=0.0 if case.domain == "grid" else 0.2).eval()
    relevance, gradient = (explained(model, x, flow)[0]["attr", "input"] for flow in FLOWS)
    assert_same(relevance, gradient, max(case.tolerance, 1e-6))


def test_there_is_a_case_of_each_operation() -> None:
    covered = {case.name for case in CASES} | set(NOT_CALLED)
    elsewhere = {name for name in OPERATIONS if name.startswith("fft_")} | {"stft", "istft", "slice"}
    assert set(OPERATIONS) - covered - elsewhere == set()


def test_ids_are_unique() -> None:
    ids = [case.id for case in CASES]
    assert sorted(set(ids)) == sorted(ids)
