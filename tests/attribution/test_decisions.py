"""Decisions on a reference: of each call anew, whatever was called before, and with masks that are infinite."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import Tensor, nn

from tdhook import LRP, Target

pytestmark = pytest.mark.usefixtures("doubles")


class Decides(nn.Module):
    """Adds a row of a table, which difference is known, and moves values to where others say, which is decided."""

    def __init__(self, moves: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.table = nn.Linear(6, 6), nn.Linear(6, 2), nn.Embedding(2, 6)
        self.moves = moves

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x) + self.table((x[:, 0] > 0.5).long())
        return self.last(self.moves(h, x))


def _sorted_by(h: Tensor, x: Tensor) -> Tensor:
    return h.gather(-1, x.sort(dim=-1, stable=True).indices)


def _put_where(h: Tensor, x: Tensor) -> Tensor:
    h = h.clone()
    h[x > 0.5] = 0.3
    return h


def _branches(h: Tensor, x: Tensor) -> Tensor:
    return h.tanh() if bool((x[:, 5] > 0.5).any()) else h


WAYS = {"gather": _sorted_by, "setitem": _put_where, "branch": _branches}
QUIET = torch.linspace(0.1, 0.2, 6).double().expand(3, 6)
"""Decided as zeros are."""


def explain(explained: nn.Module, x: Tensor) -> TensorDict:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return explained(TensorDict({"input": x.clone()}, [len(x)]))


@pytest.mark.parametrize("flow", ["relevance", "gradient"])
@pytest.mark.parametrize("way", WAYS)
def test_a_call_decides_as_if_there_had_been_none_before(way: str, flow: str) -> None:
    model = Decides(WAYS[way])
    other = QUIET + torch.eye(6)[[1, 5, 0]]

    def wrapped() -> nn.Module:
        return LRP("deeplift", target=Target("output", 0), baseline=0.0, flow=flow, ledger=False).wrap(model)

    explained = wrapped()
    for x in (QUIET, QUIET + 0.01, other, QUIET + 0.5 * torch.eye(6)[[0, 0, 0]], other.flip(0), QUIET):
        found, alone = explain(explained, x), explain(wrapped(), x)
        torch.testing.assert_close(found["attr", "input"], alone["attr", "input"])


def test_what_parts_is_told_once_by_each_explained_module() -> None:
    explained = LRP("deeplift", target=Target("output", 0), baseline=0.0).wrap(Decides(_sorted_by))
    x = QUIET + torch.eye(6)[[1, 5, 0]]
    with pytest.warns(UserWarning, match="gather moves other values there"):
        explained(TensorDict({"input": x}, [3]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        explained(TensorDict({"input": x.flip(0)}, [3]))


def _mask(x: Tensor) -> Tensor:
    return x.flip(-1) > 0.5


def _seen(h: Tensor, x: Tensor) -> Tensor:
    """Attention among pairs of values that sees those that are not masked, and itself."""
    q = h.unflatten(-1, (1, 3, 2))
    seen = (x.unflatten(-1, (1, 3, 2)).sum(-1) < 0.5).unsqueeze(-2) | torch.eye(3, dtype=torch.bool)
    return F.scaled_dot_product_attention(q, q, q, attn_mask=seen).flatten(1)


MASKED = {
    "masked_fill": lambda h, x: h.masked_fill(_mask(x), -math.inf).softmax(-1),
    "where": lambda h, x: torch.where(_mask(x), -math.inf, h).logsumexp(-1, keepdim=True) * h,
    "least number": lambda h, x: h.masked_fill(_mask(x), torch.finfo(h.dtype).min).softmax(-1),
    "added": lambda h, x: (h + torch.zeros_like(x).masked_fill(_mask(x), -math.inf)).softmax(-1),
    "logarithm": lambda h, x: (h + (~_mask(x)).double().log()).softmax(-1),
    "largest": lambda h, x: h.masked_fill(_mask(x), -math.inf).amax(-1, keepdim=True) * h,
    "attention": _seen,
}


class Masks(nn.Module):
    """Masks by one key what it computes of the other."""

    def __init__(self, masked: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.masked = nn.Linear(6, 6), nn.Linear(6, 2), masked

    def forward(self, x: Tensor, by: Tensor | None = None) -> Tensor:
        return self.last(self.masked(self.first(x), x if by is None else by))


@pytest.mark.parametrize("flow", ["relevance", "gradient"])
@pytest.mark.parametrize("way", MASKED)
def test_infinite_masks_made_of_the_inputs_are_decisions(way: str, flow: str) -> None:
    """No way leads from infinity to a number, so that the reference masks what the input does, which is told."""
    model = Masks(MASKED[way])
    x = torch.rand(4, 6, generator=torch.Generator().manual_seed(1)) * 0.7
    start = torch.rand(4, 6, generator=torch.Generator().manual_seed(2)) * 0.7
    with torch.no_grad():
        wanted = (model(x) - model(start, x))[:, 0]
        assert not torch.allclose(model(start), model(start, x))
    lrp = LRP("deeplift", target=Target("output", 0), baseline={"input": start}, flow=flow, ledger=True)
    with pytest.warns(UserWarning, match="masks other values there.*with the decisions that it takes"):
        td = lrp.wrap(model)(TensorDict({"input": x}, [4]))
    torch.testing.assert_close(td["attr", "input"].sum(-1), wanted)
    torch.testing.assert_close(td["ledger", "target"], wanted)
    assert td["ledger", "gap"].abs().max() < 1e-12


def test_a_kept_run_that_masks_others_is_not_taken() -> None:
    model = Masks(MASKED["masked_fill"])
    explained = LRP("deeplift", target=Target("output", 0), baseline=0.0).wrap(model)
    for x in (QUIET, QUIET + 0.1, QUIET + torch.eye(6)[:3], QUIET):
        with torch.no_grad():
            wanted = (model(x) - model(torch.zeros_like(x), x))[:, 0]
        torch.testing.assert_close(explain(explained, x)["attr", "input"].sum(-1), wanted)


def _experts(h: Tensor, x: Tensor) -> Tensor:
    """Rows that are taken out and put back by whom they are given to."""
    made = torch.zeros_like(h)
    for i, expert in enumerate((torch.tanh, torch.sigmoid)):
        chosen = (x.detach()[:, 1] > 0.5) == bool(i)
        made[chosen] = expert(h[chosen])
    return made


OFF_THE_TAPE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gather": lambda h, x: h.gather(-1, x.detach().argsort(-1)),
    "places": lambda h, x: h[torch.arange(len(h))[:, None], (x.detach() > 0.5).long()],
    "put": lambda h, x: torch.zeros_like(h).scatter(-1, x.detach().argsort(-1), h),
    "masked": lambda h, x: h.flip(-1).masked_scatter(x.detach() > 0.5, h),
    "experts": _experts,
    "item": lambda h, x: h.roll(int(x[0].argmax()), -1),
    "detached item": lambda h, x: h.roll(x[0].detach().argmax().item(), -1),
    "list": lambda h, x: h[:, x[0].detach().argsort().tolist()],
    "unbound": lambda h, x: h.flip(-1) + h.unbind(-1)[int(x[0].argmax())].unsqueeze(-1),
    "order": lambda h, x: torch.cat(h.chunk(2, -1)[:: 1 if bool(x[0, 0] > 0.2) else -1], -1),
    "times": lambda h, x: h * int(x[0].detach().argmax()),
}


@pytest.mark.parametrize("flow", ["relevance", "gradient"])
@pytest.mark.parametrize("way", OFF_THE_TAPE)
def test_decisions_that_no_tape_knows_are_those_of_the_input(way: str, flow: str) -> None:
    """Places made of detached values, and numbers that are read into Python, with which it chooses."""
    x, start = torch.rand(2, 4, 6, generator=torch.Generator().manual_seed(3))
    model, decides = Decides(OFF_THE_TAPE[way]), OFF_THE_TAPE[way]
    with torch.no_grad():
        seen = x if way in ("masked", "experts") else start  # where masks are taken over, all of them are
        at_start = model.first(start) + model.table((seen[:, 0] > 0.5).long())
        wanted = (model(x) - model.last(decides(at_start, x)))[:, 0]
        assert not torch.allclose(model(start), model.last(decides(at_start, x)))
    explained = LRP("deeplift", target=Target("output", 0), baseline=start, flow=flow, ledger=True).wrap(
        model
    )
    with pytest.warns(UserWarning, match="there.*with the decisions that it takes on the input"):
        td = explained(TensorDict({"input": x}, [4]))
    torch.testing.assert_close(td["ledger", "target"], wanted)
    assert td["ledger", "gap"].abs().max() < 1e-9


def test_numbers_that_are_read_are_told() -> None:
    x, start = torch.rand(2, 4, 6, generator=torch.Generator().manual_seed(3))
    explained = LRP("deeplift", target=Target("output", 0), baseline=start).wrap(
        Decides(OFF_THE_TAPE["list"])
    )
    with pytest.warns(UserWarning, match=r"tolist\(\) is \[.*\] there instead of \[.*\]; on the reference"):
        explained(TensorDict({"input": x}, [4]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        explained(TensorDict({"input": x}, [4]))


@pytest.mark.parametrize("baseline", [0.0, 0.9])
def test_a_kept_reference_reads_what_the_input_does(baseline: float) -> None:
    """One that was kept from a call that read the same is not taken for one that reads something else."""
    model = Decides(lambda h, x: h.roll(int(x[0].argmax()), -1))
    lrp = LRP("deeplift", target=Target("output", 0), baseline=baseline)
    explained = lrp.wrap(model)
    for place in (0, 3, 0, 5):
        x = QUIET + 0.2 * torch.eye(6)[place]
        found, alone = explain(explained, x), explain(lrp.wrap(model), x)
        torch.testing.assert_close(found["attr", "input"], alone["attr", "input"])


class Experts(nn.Module):
    """Rows go to the experts that score highest, whose values are weighed by the scores."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.scores, self.last = nn.Linear(4, 3), nn.Linear(5, 2)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 5), nn.GELU()) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        scores, chosen = self.scores(x).topk(2, -1)
        found = x.new_zeros(len(x), 5)
        for number, expert in enumerate(self.experts):
            rows, which = torch.where(chosen == number)
            found = found.index_add(0, rows, expert(x[rows]) * scores[rows, which, None])
        return self.last(found)

    def as_chosen(self, x: Tensor, chosen: Tensor) -> Tensor:
        """What comes out of ``x`` with the experts that others chose."""
        each = torch.stack([expert(x) for expert in self.experts], 1)
        scores = self.scores(x).gather(1, chosen)
        return self.last((each.gather(1, chosen[..., None].expand(-1, -1, 5)) * scores[..., None]).sum(1))


@pytest.mark.parametrize("ledger", [False, True], ids=["bare", "ledger"])
@pytest.mark.parametrize("flow", ["relevance", "gradient"])
def test_what_is_picked_stays_decided_where_one_row_is_tried(flow: str, ledger: bool) -> None:
    model, lrp = (
        Experts(),
        LRP("deeplift", target=Target("output", 1), baseline=0.3, flow=flow, ledger=ledger),
    )
    explained = lrp.wrap(model)
    for seed in (1, 2):  # the second batch decides otherwise
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        chosen = model.scores(x).topk(2, -1).indices
        rise = model(x) - model.as_chosen(torch.full_like(x, 0.3), chosen)
        found = explain(explained, x)["attr", "input"]
        torch.testing.assert_close(found.sum(-1), rise[:, 1].detach(), rtol=1e-9, atol=1e-9)
        alone = torch.cat([explain(lrp.wrap(model), row)["attr", "input"] for row in x.split(1)])
        torch.testing.assert_close(found, alone, rtol=1e-9, atol=1e-9)
