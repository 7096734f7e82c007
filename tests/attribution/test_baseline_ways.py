"""All of a difference arrives, however a model computes: overwriting constants, in groups, behind masks, in pairs."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from differences import FLOWS, explained
from tensordict import TensorDict
from torch import Tensor, nn

from tdhook import LRP, Target

pytestmark = pytest.mark.usefixtures("doubles")

GROUPS = torch.tensor([0, 0, 1, 2, 2, 2])


def const(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) + 0.5


def _groups(h: Tensor) -> Tensor:
    return GROUPS.expand_as(h)


def _overwritten_later(h: Tensor) -> Tensor:
    factor = const(6)
    made = (h * factor).relu()
    factor.mul_(-3)
    return made + h * factor


WAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "added to a constant": lambda h: const(*h.shape).add_(h),
    "times a constant": lambda h: const(*h.shape).mul_(h),
    "product added to a constant": lambda h: const(len(h), 4).addmm_(h, const(6, 4), beta=0.5, alpha=2),
    "scattered over a constant": lambda h: const(len(h), 3).scatter_add_(1, _groups(h), h),
    "means with a constant": lambda h: const(len(h), 3).scatter_reduce_(1, _groups(h), h, "mean"),
    "products with a constant": lambda h: const(len(h), 3).scatter_reduce_(1, _groups(h), h + 3, "prod"),
    "a constant as output": lambda h: torch.add(h, const(*h.shape), out=torch.empty_like(h)),
    "a constant that is overwritten later": _overwritten_later,
    "sums by index": lambda h: const(3, len(h)).index_put((GROUPS,), h.T, accumulate=True).T,
    "constant over it": lambda h: torch.div(torch.full_like(h, 1.5), h + 4),
    "least norm": lambda h: torch.linalg.vector_norm(h + 3, -math.inf, dim=-1, keepdim=True),
    "roots where there are any": lambda h: torch.where(h > 0, h.sqrt(), h),
    "remainders": lambda h: torch.remainder(3 * h, h.flip(-1).abs() + 0.5),
    "remainders towards zero": lambda h: torch.fmod(3 * h, h[:, :1].abs() + 0.5),
    "remainders of a constant": lambda h: torch.remainder(const(6), h[:, :1].abs() + 0.5),
    "rounded quotients": lambda h: torch.div(3 * h, h.flip(-1).abs() + 0.5, rounding_mode="trunc"),
    "whole quotients": lambda h: (3 * h) // (h[:, :1].abs() + 0.5),
    "mantissas": lambda h: torch.frexp(h)[0],
    "taken apart and put together": lambda h: torch.ldexp(*torch.frexp(h)),
    "mask as numbers like others": lambda h: (h > 0).to(h) * h.flip(-1) + (h > 0.1).type_as(h),
    "complex product": lambda h: torch.view_as_real(
        torch.view_as_complex(h.reshape(-1, 3, 2)) * torch.polar(const(3), const(3, seed=1))
    ),
}


class Net(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function, self.first = function, nn.Linear(6, 6, bias=False)
        self.last = nn.Linear(function(torch.rand(2, 6)).numel() // 2, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.first(x)).reshape(len(x), -1))


@pytest.mark.parametrize("flow", ["relevance", "gradient"])
@pytest.mark.parametrize("ledger", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_all_of_the_difference_arrives(way: str, flow: str, ledger: bool) -> None:
    model = Net(WAYS[way])
    x, start = torch.randn(4, 6, generator=torch.Generator().manual_seed(2)), torch.linspace(0.2, 0.6, 6)
    lrp = LRP("deeplift", target=Target("output", 0), baseline=start, flow=flow, ledger=ledger)
    with lrp.prepare(model) as explained:
        for _ in range(2):
            td = explained(TensorDict({"input": x.clone()}, [4]))
            with torch.no_grad():
                ends = model(x), model(start.expand_as(x))
            assert torch.equal(td["output"], ends[0])
            torch.testing.assert_close(td["attr", "input"].sum(-1), (ends[0] - ends[1])[:, 0])
            if ledger:
                assert td["ledger", "gap"].abs().max() < 1e-9


def test_values_put_where_it_is_negative_are_those_of_the_input() -> None:
    """A mask that the model makes of its values is a decision, which is told of, and nothing is lost by it."""

    def clipped(h: Tensor) -> Tensor:
        h = h.clone()
        h[h < 0] = 0.5
        return h

    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(2))
    lrp = LRP("deeplift", target=Target("output", 0), baseline=torch.linspace(0.2, 0.6, 6), ledger=True)
    with lrp.prepare(Net(clipped)) as explained, pytest.warns(UserWarning, match="decisions"):
        td = explained(TensorDict({"input": x}, [4]))
    assert td["ledger", "gap"].abs().max() < 1e-9


@pytest.mark.parametrize("ledger", [False, True])
def test_what_depends_on_nothing_is_told(ledger: bool) -> None:
    lrp = LRP("deeplift", target="output", baseline=0.3, ledger=ledger)
    explained = lrp.wrap(Net(lambda h: torch.frexp(h)[1].to(h)))
    with pytest.raises(ValueError, match="the target 'output' does not depend on any attributed input"):
        explained(TensorDict({"input": torch.rand(4, 6)}, [4]))


MOVED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "joined with a mask": lambda h, copy: torch.cat([h, (copy > 0).double()], -1),
    "joined with what is there": lambda h, copy: torch.stack([h, copy.isfinite() * 2.0], -1),
    "joined with a choice": lambda h, copy: torch.cat([h, copy.argmax(-1, keepdim=True)], -1),
    "joined with a copy": lambda h, copy: torch.cat([h, copy.square()], -1),
    "overwritten by a mask": lambda h, copy: h.index_copy(-1, COLUMN, (copy[:, :1] > 0).double()),
    "overwritten by a copy": lambda h, copy: h.scatter(-1, COLUMN.expand(len(h), 1), copy[:, 3:4]),
    "complex with a copy": lambda h, copy: torch.view_as_real(torch.complex(h, copy.flip(-1))),
}
COLUMN = torch.tensor([2])


@pytest.mark.parametrize("flow", ["relevance", "gradient"])
@pytest.mark.parametrize("way", MOVED)
def test_what_is_moved_beside_the_tape_is_absorbed(way: str, flow: str) -> None:
    """Nothing leads from a mask made into numbers, or from a copy, to the inputs: their share is a constant's."""
    model = Net(lambda h: MOVED[way](h, h.detach()))
    x, start = torch.randn(4, 6, generator=torch.Generator().manual_seed(2)), torch.linspace(0.2, 0.6, 6)
    found = []
    for ledger in (False, True):
        lrp = LRP("deeplift", target=Target("output", 0), baseline=start, flow=flow, ledger=ledger)
        td = lrp.wrap(model)(TensorDict({"input": x}, [4]))
        found.append(td["attr", "input"])
    torch.testing.assert_close(*found)
    with torch.no_grad():
        h, h0 = model.first(x), model.first(start.expand_as(x))
        made, beside, there = (MOVED[way](*given).reshape(4, -1) for given in ((h, h), (h, h0), (h0, h0)))
        rise, rest = ((model.last(made) - model.last(other))[:, 0] for other in (there, beside))
    torch.testing.assert_close(td["ledger", "target"], rise)
    torch.testing.assert_close(td["ledger", "absorbed"], rest)
    torch.testing.assert_close(td["ledger", "inputs"], rise - rest)
    assert td["ledger", "gap"].abs().max() < 1e-12


class Centred(nn.Module):
    """Takes a mean off its input that it keeps up to date: in its own memory, or in another."""

    def __init__(self, *, in_place: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.last, self.in_place = nn.Linear(4, 2), in_place
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            mean = 0.5 * self.mean + 0.5 * x.mean(0)
            self.mean = self.mean.copy_(mean) if self.in_place else mean
        return self.last((x - self.mean) * (1 + self.mean.square()))


@pytest.mark.parametrize("ledger", [False, True], ids=["bare", "ledger"])
@pytest.mark.parametrize("flow", FLOWS)
def test_what_a_model_keeps_up_to_date_is_another_on_the_reference(flow: str, ledger: bool) -> None:
    x = torch.randn(5, 4)
    found, expected = (
        explained(Centred(in_place=in_place), x, 0.3, flow=flow, ledger=ledger) for in_place in (True, False)
    )
    torch.testing.assert_close(found["attr", "input"], expected["attr", "input"])
    rise = found["output"] - Centred(in_place=True)(torch.full_like(x, 0.3))
    torch.testing.assert_close(found["attr", "input"].sum(-1), rise[:, 0].detach())
