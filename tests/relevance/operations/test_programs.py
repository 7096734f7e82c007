"""Programs that nobody wrote are explained without loss and without side effect."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from drawing import drawing
from hypothesis import HealthCheck, given, note
from hypothesis import strategies as st
from tensordict import TensorDict
from torch import Tensor, nn
from unchanged import Unchanged

from tdhook import LRP, Target
from tdhook.models.families import Activation
from tdhook.relevance.ledger.ledger import Ledger
from tdhook.rules import EpsilonRule, IgnoreRule, PassRule
from tdhook.selectors import Op

from .checks import FLOWS
from .programs import BINARY, IN_PLACE, MODULES, UNARY, Line, N, Program

COMPOSITES = {
    "layers": [(nn.Linear, EpsilonRule(1e-12))],
    "layers and activations": [(nn.Linear, EpsilonRule(1e-12)), (Activation, PassRule())],
    "operations": [(Op("linear"), EpsilonRule(1e-12)), (Op("add", "mean"), EpsilonRule(1e-12))],
}


lines = st.one_of(
    st.builds(Line, st.just("module"), st.sampled_from(sorted(MODULES)), st.integers(0, 7), st.just(0)),
    st.builds(Line, st.just("unary"), st.sampled_from(sorted(UNARY)), st.integers(0, 7), st.just(0)),
    st.builds(Line, st.just("binary"), st.sampled_from(sorted(BINARY)), st.integers(0, 7), st.integers(0, 7)),
    st.builds(
        Line, st.just("in place"), st.sampled_from(sorted(IN_PLACE)), st.integers(0, 7), st.integers(0, 7)
    ),
)
EQUALS = {"clamp_", "spread"}
often = drawing(40, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])


@contextmanager
def measured() -> Iterator[dict[str, float]]:
    """How much relevance any value had, where a ledger is kept."""
    seen, original = {"largest": 0.0}, Ledger.note

    def note(self: Ledger, entry: Any, column: str, amount: Tensor) -> None:
        seen["largest"] = max(seen["largest"], amount.abs().max().item())
        original(self, entry, column, amount)

    with mock.patch.object(Ledger, "note", note):
        yield seen


def memory_of(model: nn.Module) -> list[object]:
    """What the modules of a program remember."""
    held = [vars(module).get(name) for module in model.modules() for name in ("calls", "last")]
    return [*model.buffers(), *held]


def assert_same(found: list[object], wanted: list[object]) -> None:
    for one, other in zip(found, wanted, strict=True):
        if isinstance(one, Tensor):
            assert torch.equal(one.detach(), other.detach()) and one.grad_fn is None
        else:
            assert one == other


@often
@given(
    st.lists(lines, min_size=1, max_size=9),
    st.sampled_from([(3,), (2, 2), (1,), ()]),
    st.sampled_from(sorted(COMPOSITES)),
    st.integers(0, 999),
)
def test_random_programs(program: list[Line], batch: tuple[int, ...], composite: str, seed: int) -> None:
    torch.manual_seed(seed)
    model = Program(program).double().eval()
    x = torch.randn(*batch, N, dtype=torch.float64)
    plain = copy.deepcopy(model)
    with torch.no_grad():
        expected = [plain(x.clone()) for _ in range(2)]
    if not all(torch.isfinite(z).all() and z.abs().max() <= 1e4 for z in expected):
        return
    rounding = 1e-5 if any(line.name == "single precision" for line in program) else 1e-9
    remembers = any(line.name in ("counts", "remembers") for line in program)
    found = {}
    for flow in FLOWS:
        for ledger in (False, True):
            lrp = LRP(
                COMPOSITES[composite],
                target=Target("output", 0),
                flow=flow,
                ledger=ledger,
                on_unmatched="raise",
            )
            same = copy.deepcopy(model)
            unchanged = Unchanged(same)
            td = TensorDict({"input": x.clone()}, batch_size=batch)
            with lrp.prepare(same) as explained, measured() as seen, torch.no_grad():
                for z in expected:  # the second run knows what the first has found out
                    td = explained(td)
                    assert torch.equal(td["output"], z), f"{flow}, ledger={ledger}"
            assert torch.equal(td["input"], x)
            if not remembers:
                unchanged.check()
            assert_same(memory_of(same), memory_of(plain))
            found[flow, ledger] = td["attr", "input"]
            if ledger:
                scale = max(seen["largest"], 1e-6)
                stopped = sum(e.of("stabiliser").abs().max().item() for e in explained.ledger.entries)
                note(f"{flow}: scale {scale:.3g}, target {td['ledger', 'target'].tolist()}")
                if scale > 1e4 * expected[1].abs().max():
                    return  # numbers cancel somewhere, and what is left is rounding
                assert td["ledger", "gap"].abs().max() <= rounding * scale
    for flow in FLOWS:
        assert (found[flow, True] - found[flow, False]).abs().max() <= rounding * scale
    # Relevance of a value of zero stops in the gradient convention, at the stabiliser; else the flows agree, unless
    # equal values cancel: the relevance convention has nothing there, the other one what each of them had.
    if stopped <= 1e-8 * scale and not EQUALS & {line.name for line in program}:
        assert (found["relevance", True] - found["gradient", True]).abs().max() <= max(1e-6, rounding) * scale


def test_the_ledger_notices_what_a_program_loses() -> None:
    """The oracle of these tests can fail: a sum that copies relevance to both of its arguments opens a gap."""
    model = Program([Line("module", "unbiased", 0, 0), Line("binary", "add", 0, 1)]).double().eval()
    x = torch.randn(3, N, dtype=torch.float64)
    composite = [(nn.Linear, EpsilonRule(1e-12)), (Op("add"), IgnoreRule())]
    with LRP(composite, target=Target("output", 0), flow="relevance", ledger=True).prepare(
        model
    ) as explained:
        td = explained(TensorDict({"input": x}, batch_size=[3]))
    assert (td["ledger", "gap"].abs() > 1e-3 * td["ledger", "target"].abs()).all()


# Where differences of nothing meet gradients that cancel, only the gradient convention tells these apart.
CANCELS = {"relu", "relu_", "relu in place", "clamp_"}
REMEMBERS = {"counts", "remembers"}


@often
@given(
    st.lists(lines, min_size=1, max_size=9),
    st.sampled_from([(3,), (2, 2), (1,), ()]),
    st.booleans(),
    st.integers(0, 999),
)
def test_random_programs_against_random_references(
    program: list[Line], batch: tuple[int, ...], one_row: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    names = {line.name for line in program}
    model = Program(program).double().eval()
    x, start = (torch.randn(*batch, N, dtype=torch.float64) for _ in range(2))
    start = start.reshape(-1, N)[0] if one_row else start
    if names & REMEMBERS:
        return  # its value on the reference is one thing before a call and another one after it
    with torch.no_grad():
        ends = [copy.deepcopy(model)(value.expand(*batch, N).clone()) for value in (x, start)]
    if not all(torch.isfinite(z).all() and z.abs().max() <= 1e4 for z in ends):
        return
    wanted = (ends[0] - ends[1])[..., 0]
    rounding = 1e-5 if "single precision" in names else 1e-9
    found = {}
    for flow in FLOWS:
        for ledger in (True, False):
            lrp = LRP(
                "deeplift",
                target=Target("output", 0),
                baseline=start,
                flow=flow,
                ledger=ledger,
                on_unmatched="raise",
            )
            same = copy.deepcopy(model)
            unchanged = Unchanged(same)
            td = TensorDict({"input": x.clone()}, batch_size=batch)
            with lrp.prepare(same) as explained, torch.no_grad():
                for _ in range(2):
                    td = explained(td)
                    assert torch.equal(td["output"], ends[0])
            unchanged.check()
            relevance = found[flow, ledger] = td["attr", "input"]
            scale = max(1.0, *(float(value.abs().max()) for value in (*ends, relevance)))
            note(f"{flow}, ledger={ledger}: {relevance.sum(-1).tolist()} of {wanted.tolist()}")
            arrived = relevance.sum(-1)
            off = arrived - wanted if "coupled" not in names else arrived.sum() - wanted.sum()
            assert off.abs().max() <= rounding * scale
            if ledger:
                assert td["ledger", "gap"].abs().max() <= rounding * scale
    one, other = found["relevance", True], found["gradient", True]
    if not names & CANCELS:
        assert (one - other).abs().max() <= max(1e-8, rounding) * scale
    for flow in FLOWS:
        assert (found[flow, True] - found[flow, False]).abs().max() <= max(1e-8, rounding) * scale
