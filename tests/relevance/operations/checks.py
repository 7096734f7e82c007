"""What the tests of operations share: a model around a function, and what must hold of its explanation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from tdhook import LRP, Target
from tdhook.rules import EpsilonRule

FLOWS = ("relevance", "gradient")
TINY = [(nn.Linear, EpsilonRule(1e-12))]
"""A composite that leaves all operations to their defaults and keeps nothing to speak of."""

every_flow = pytest.mark.parametrize("flow", FLOWS)
either_ledger = pytest.mark.parametrize("ledger", [False, True], ids=["bare", "ledger"])


class Calls(nn.Module):
    """A function between two layers without bias: ``head(f(trunk(x)))``."""

    def __init__(self, f: Callable[[Tensor], Tensor], x: Tensor, mixing: float = 0.2) -> None:
        super().__init__()
        width = x.shape[-1]
        self.f = f
        self.trunk = nn.Linear(width, width, bias=False, dtype=x.dtype)
        self.trunk.weight.data = (1 - mixing) * torch.eye(width).roll(5, 0) + mixing / width
        self.trunk.weight.data = self.trunk.weight.data.to(x.dtype)
        with torch.no_grad():
            made = f(self.trunk(x))
        self.head = nn.Linear(made.numel() // x.shape[0], 2, bias=False, dtype=x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        made = self.f(self.trunk(x)).reshape(x.shape[0], -1)
        return self.head(made if made.dtype == x.dtype else made.to(x.dtype))


def around(f, width: int = 6, seed: int = 0) -> tuple[Calls, Tensor]:
    """A model that calls ``f``, and an input for it."""
    torch.manual_seed(seed)
    x = torch.randn(3, width, dtype=torch.float64)
    return Calls(f, x).eval(), x


def plainly(model: nn.Module, x: Tensor) -> Tensor:
    """What a model with frozen parameters returns, and from the same randomness as :func:`explained`."""
    flags = {p: p.requires_grad for p in model.parameters()}
    model.requires_grad_(False)
    torch.manual_seed(1)
    value = model(x.clone())
    for p, flag in flags.items():
        p.requires_grad_(flag)
    return value


def explained(model, x, flow, composite=TINY, *, target=None, ledger=True, batch=None, **kwargs):
    """The explanation of a plain module, and the explained module that gave it."""
    kwargs.setdefault("on_unmatched", "raise")
    lrp = LRP(composite, target=target or Target("output", 0), flow=flow, ledger=ledger, **kwargs)
    with lrp.prepare(model) as module:
        torch.manual_seed(1)
        batch = x.shape[:1] if batch is None else batch
        return module(TensorDict({"input": x.clone()}, batch_size=batch)), module


def operations_in(module) -> set[str]:
    """The names of all operations that were intercepted."""
    return {known.operation.name for known in module._state.plan.interception.rules.known.values()}


def scale_of(td, module) -> float:
    """The most relevance that was anywhere."""
    amounts = [td["ledger", "target"].abs().max().item()]
    for entry in module.ledger.entries:
        amounts += [entry.of(column).abs().max().item() for column in ("arrived", "left")]
    return max(amounts)


def assert_balanced(td, module, tolerance: float = 1e-9) -> None:
    """Nothing was lost or made, beyond rounding."""
    gap, scale = td["ledger", "gap"].abs().max().item(), scale_of(td, module)
    worst = {
        f"{e.path}:{e.name}": e.gap for e in module.ledger.entries if e.gap.abs().max() > tolerance * scale
    }
    assert gap <= tolerance * scale, f"gap {gap:.3g} of {scale:.3g}, at {worst}"
    assert torch.isfinite(td["attr", "input"]).all()


def assert_same(a: Tensor, b: Tensor, tolerance: float = 1e-6, scale: float | None = None) -> None:
    """The same relevance, relative to the largest value."""
    scale = max(a.abs().max().item(), b.abs().max().item()) if scale is None else scale
    worst = (a - b).abs().max().item()
    assert worst <= tolerance * scale, f"{worst:.3g} apart, of {scale:.3g}"


def relevance_of(f, flow: str, **kwargs) -> Tensor:
    """The relevance of the input of a model that calls ``f``, once output and balance were checked."""
    model, x = around(f)
    td, module = explained(model, x, flow, **kwargs)
    assert torch.equal(td["output"], plainly(model, x))
    if module.ledger is not None:
        assert_balanced(td, module)
    return td["attr", "input"]
