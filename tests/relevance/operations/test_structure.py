"""How models are put together: structures between modules, shared layers, batch norms; and no trace of a run."""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import Tensor, nn
from unchanged import Boom, Unchanged

from tdhook.rules import EpsilonRule

from .checks import around, assert_balanced, assert_same, either_ledger, every_flow, explained, plainly


@dataclass
class Both:
    left: Tensor
    right: Tensor


class Named(NamedTuple):
    left: Tensor
    right: Tensor


KINDS = {
    "tuple": (lambda a, b: (a, b), lambda p: p),
    "list": (lambda a, b: [a, b], lambda p: p),
    "dict": (lambda a, b: {"l": a, "r": b}, lambda p: (p["l"], p["r"])),
    "nested": (lambda a, b: {"l": (a, [b])}, lambda p: (p["l"][0], p["l"][1][0])),
    "dataclass": (Both, lambda p: (p.left, p.right)),
    "named tuple": (Named, lambda p: p),
    "tensordict": (lambda a, b: TensorDict(l=a, r=b, batch_size=a.shape[:1]), lambda p: (p["l"], p["r"])),
}


class Makes(nn.Module):
    def __init__(self, pack) -> None:
        super().__init__()
        self.pack = pack

    def forward(self, x: Tensor):
        return self.pack(x[:, :3] * 2, x[:, 3:].tanh())


class Uses(nn.Module):
    def __init__(self, unpack) -> None:
        super().__init__()
        self.unpack, self.linear = unpack, nn.Linear(3, 6, bias=False, dtype=torch.float64)

    def forward(self, values) -> Tensor:
        left, right = self.unpack(values)
        return self.linear(left) + self.linear(right)


@every_flow
@pytest.mark.parametrize("kind", KINDS)
def test_structures_between_modules(kind: str, flow: str) -> None:
    def model(pack, unpack):
        torch.manual_seed(0)
        return nn.Sequential(Makes(pack), Uses(unpack))

    x = torch.randn(3, 6, dtype=torch.float64)
    td, module = explained(model(*KINDS[kind]), x, flow)
    assert_balanced(td, module)
    expected, _ = explained(model(*KINDS["tuple"]), x, flow)
    assert torch.equal(td["output"], expected["output"])
    assert_same(td["attr", "input"], expected["attr", "input"], 1e-9)


@every_flow
def test_tied_weights_and_repeated_layers(flow: str) -> None:
    class Tied(nn.Module):
        def __init__(self, tied: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
            self.tied = tied
            self.b.load_state_dict(self.a.state_dict())
            self.c.weight = self.a.weight if tied else nn.Parameter(self.a.weight.detach().clone())

        def forward(self, x: Tensor) -> Tensor:
            second = self.a if self.tied else self.b
            return F.linear(self.c(second(self.a(x).relu()).relu()), self.a.weight[:2])

    x = torch.randn(3, 6, dtype=torch.float64)
    (td, module), (other, _) = (explained(Tied(tied).double(), x, flow) for tied in (True, False))
    assert_balanced(td, module)
    assert_same(td["attr", "input"], other["attr", "input"], 1e-12)
    assert sum(entry.path == "a" for entry in module.ledger.entries) == 2


STANDS = {
    "first": lambda: nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 2)),
    "behind linear": lambda: nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)),
    "behind activation": lambda: nn.Sequential(
        nn.Linear(6, 6), nn.Tanh(), nn.BatchNorm1d(6), nn.Linear(6, 2)
    ),
    "twice": lambda: nn.Sequential(nn.BatchNorm1d(6), nn.BatchNorm1d(6), nn.Linear(6, 2)),
    "without statistics of its own": lambda: nn.Sequential(nn.BatchNorm1d(6, affine=False), nn.Linear(6, 2)),
    "last": lambda: nn.Sequential(nn.Linear(6, 2), nn.BatchNorm1d(2)),
}


@every_flow
@pytest.mark.parametrize("where", STANDS)
@pytest.mark.parametrize("merge", [True, False], ids=["merged", "on its own"])
def test_batch_norm_in_eval_mode(where: str, merge: bool, flow: str) -> None:
    torch.manual_seed(0)
    model = STANDS[where]().double()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm1d):
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2.0)
            if m.affine:
                nn.init.normal_(m.weight)
                nn.init.normal_(m.bias)
    model.eval()
    x = torch.randn(3, 6, dtype=torch.float64)
    td, module = explained(model, x, flow, merge_batch_norm=merge)
    torch.testing.assert_close(td["output"], plainly(model, x), rtol=1e-12, atol=1e-12)
    assert_balanced(td, module)


# Traces.


class Breaks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.act, self.b = nn.Linear(6, 6), nn.ReLU(inplace=True), nn.Linear(6, 2)
        self.b.weight.requires_grad_(False)
        self.a.register_forward_hook(lambda module, args, output: None)
        self.error: type[BaseException] | None = None

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.a(x))
        h += x
        if self.error is not None:
            raise self.error("no")
        return self.b(h)


@every_flow
@either_ledger
@pytest.mark.parametrize("error", [Boom, RuntimeError, KeyboardInterrupt])
def test_all_is_as_before_when_the_model_raises(error, ledger: bool, flow: str) -> None:
    model = Breaks().double().eval()
    x = torch.randn(3, 6, dtype=torch.float64)
    unchanged, modes = Unchanged(model), torch.overrides._get_current_function_mode_stack()
    model.error = error
    with pytest.raises(error):
        explained(model, x, flow, ledger=ledger)
    model.error = None
    unchanged.check()
    assert torch.overrides._get_current_function_mode_stack() == modes
    assert not nn.modules.module._global_forward_hooks
    assert not nn.modules.module._global_forward_pre_hooks
    td, _ = explained(model, x, flow, ledger=ledger)
    assert torch.equal(td["output"], plainly(model, x))
    unchanged.check()


@every_flow
def test_an_error_that_the_model_catches(flow: str) -> None:
    class Catches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.other = Breaks(), nn.Linear(6, 2)
            self.inner.error = ValueError

        def forward(self, x: Tensor) -> Tensor:
            try:
                return self.inner(x)
            except Exception:
                return self.other(torch.tanh(x))

    model, x = Catches().double().eval(), torch.randn(3, 6, dtype=torch.float64)
    td, module = explained(model, x, flow)
    assert torch.equal(td["output"], plainly(model, x))
    assert_balanced(td, module)
    assert {e.path for e in module.ledger.entries if e.name == "tanh()"} == {""}


@every_flow
@pytest.mark.parametrize("frozen", ["none", "some", "all"])
def test_parameters_need_no_gradient(frozen: str, flow: str) -> None:
    torch.manual_seed(0)
    model = Breaks().double().eval()
    model.b.weight.requires_grad_(True)
    if frozen == "all":
        model.requires_grad_(False)
    elif frozen == "some":
        model.a.bias.requires_grad_(False)
    x = torch.randn(3, 6, dtype=torch.float64)
    unchanged = Unchanged(model)
    td, module = explained(model, x, flow)
    unchanged.check()
    assert_balanced(td, module)
    model.requires_grad_(True)
    expected, _ = explained(model, x, flow)
    assert torch.equal(td["attr", "input"], expected["attr", "input"])


@every_flow
@pytest.mark.parametrize(
    "mode", [torch.no_grad, torch.inference_mode, torch.enable_grad], ids=lambda m: m.__name__
)
def test_called_in_any_gradient_mode(mode, flow: str) -> None:
    torch.manual_seed(0)
    model = Breaks().double().eval()
    x = torch.randn(3, 6, dtype=torch.float64)
    expected, _ = explained(model, x, flow)
    with mode():
        made = x * 1.0  # under inference_mode an inference tensor
        td, _ = explained(model, made, flow)
    assert torch.equal(td["attr", "input"], expected["attr", "input"])
    assert torch.equal(td["output"], expected["output"])


LATER = {
    "generator": lambda a, b: (x for x in (a, b)),
    "list_iterator": lambda a, b: iter([a, b]),
    "mappingproxy": lambda a, b: MappingProxyType({"l": a, "r": b}),
    "partial": lambda a, b: partial(torch.add, a, b),
    "function": lambda a, b: lambda: a + b,
}


class Later(nn.Module):
    def __init__(self, packed) -> None:
        super().__init__()
        self.linear, self.packed = nn.Linear(6, 6), packed

    def forward(self, x: Tensor) -> object:
        return self.packed(self.linear(x), x)


@pytest.mark.parametrize("kind", LATER)
def test_what_a_unit_gives_out_later_is_refused(kind: str) -> None:
    class Unpacks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Later(LATER[kind])

        def forward(self, x: Tensor) -> Tensor:
            made = self.inner(x)
            if callable(made):
                return made()
            left, right = made.values() if kind == "mappingproxy" else made
            return left + right

    model, x = Unpacks().double(), torch.randn(3, 6, dtype=torch.float64)
    explained(model, x, "relevance")  # its operations are seen
    with pytest.raises(
        NotImplementedError, match=f"module `inner`, a Later, .* returns a {kind}, which gives out"
    ):
        explained(model, x, "relevance", [(Later, EpsilonRule())])


def test_nothing_is_kept_alive() -> None:
    model, x = around(lambda h: (h * h.flip(-1)).relu_())
    seen = []
    handle = model.head.register_forward_hook(lambda m, args, output: seen.append(weakref.ref(args[0])))
    explained(model, x, "relevance", ledger=False)
    handle.remove()
    gc.collect()
    assert all(ref() is None for ref in seen)
