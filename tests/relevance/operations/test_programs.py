"""Programs that nobody wrote are explained without loss and without side effect."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
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

N = 4
MASK = torch.tensor([True, False, False, True])
COMPOSITES = {
    "layers": [(nn.Linear, EpsilonRule(1e-12))],
    "layers and activations": [(nn.Linear, EpsilonRule(1e-12)), (Activation, PassRule())],
    "operations": [(Op("linear"), EpsilonRule(1e-12)), (Op("add", "mean"), EpsilonRule(1e-12))],
}


@dataclass
class Pair:
    left: Tensor
    right: Tensor


class Crosses(nn.Module):
    """Takes a dictionary and returns a dataclass."""

    def forward(self, values: dict[str, Tensor]) -> Pair:
        return Pair(values["a"] + values["b"], values["a"] * 0.5 - values["b"])


class Splits(nn.Module):
    """Returns a tuple of views."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x[..., : N // 2], x[..., N // 2 :]


class OnACopy(nn.Module):
    """Hands a module a tensor that nobody else sees."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.clone())


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(N, 2 * N)

    def forward(self, x: Tensor) -> Tensor:
        return F.glu(self.inner(x), -1)


class Attends(nn.Module):
    """Attention among pairs of features."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(N, 3 * N)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, N // 2)).unbind(-3)
        return F.scaled_dot_product_attention(q, k, v).flatten(-2)


MODULES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(N, N),
    "unbiased": lambda: nn.Linear(N, N, bias=False),
    "layer norm": lambda: nn.LayerNorm(N),
    "rms norm": lambda: nn.RMSNorm(N, eps=1e-3),
    "relu": lambda: nn.ReLU(),
    "gelu": lambda: nn.GELU(),
    "relu in place": lambda: OnACopy(nn.ReLU(inplace=True)),
    "dropout": lambda: nn.Dropout(0.3),
    "identity": lambda: nn.Identity(),
    "mlp": lambda: nn.Sequential(nn.Linear(N, 6), nn.SiLU(), nn.Linear(6, N)),
    "gated": Gated,
    "attention": Attends,
}


def _overwrite(x: Tensor, y: Tensor) -> Tensor:
    x[..., 1:3] = y[..., :2]
    return x


def _through_view(x: Tensor, y: Tensor) -> Tensor:
    view = x[..., :2]
    view.mul_(0.5)
    view += y[..., 2:]
    return x


def _pair(x: Tensor, y: Tensor) -> Tensor:
    pair = Crosses()({"a": x, "b": y})
    return pair.left * 0.5 + pair.right


UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "tanh": torch.tanh,
    "sigmoid": Tensor.sigmoid,
    "softplus": F.softplus,
    "gelu": F.gelu,
    "abs": abs,
    "square": lambda x: x**2,
    "scale": lambda x: 1.5 * x,
    "shift": lambda x: x + 0.25,
    "negative": lambda x: -x,
    "flip": lambda x: x.flip(-1),
    "softmax": lambda x: x.softmax(-1),
    "normalised": lambda x: x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt(),
    "centred": lambda x: x - x.mean(-1, keepdim=True),
    "spread": lambda x: x.sum(-1, keepdim=True).expand_as(x),
    "cumsum": lambda x: x.cumsum(-1),
    "sorted": lambda x: x.sort(-1)[0],
    "masked": lambda x: x.masked_fill(MASK, 0.5),
    "shaped": lambda x: x.unflatten(-1, (2, 2)).transpose(-1, -2).flatten(-2),
    "split": lambda x: torch.cat(Splits()(x)[::-1], -1),
    "view": lambda x: x.view_as(x),
    "same": lambda x: x,
    "contiguous": lambda x: x.contiguous(),
    "detached sum": lambda x: x + x.detach() * 0.1,
}
BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "div": lambda x, y: x / (y.square() + 0.5),
    "gate": lambda x, y: x * y.sigmoid(),
    "maximum": torch.maximum,
    "where": lambda x, y: torch.where(MASK, x, y),
    "outer": lambda x, y: (x.unsqueeze(-1) @ y.unsqueeze(-2)).mean(-1),
    "stack": lambda x, y: torch.stack([x, y], -1).mean(-1),
    "lerp": lambda x, y: torch.lerp(x, y, 0.3),
    "addcmul": lambda x, y: torch.addcmul(x, x, y, value=0.5),
    "pair": _pair,
}
IN_PLACE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add_": lambda x, y: x.add_(y),
    "mul_": lambda x, y: x.mul_(y),
    "scaled": lambda x, y: x.mul_(0.7),
    "relu_": lambda x, y: F.relu_(x),
    "tanh_": lambda x, y: x.tanh_(),
    "clamp_": lambda x, y: x.clamp_(-0.6, 0.9),
    "copy_": lambda x, y: x.copy_(y),
    "masked_fill_": lambda x, y: x.masked_fill_(MASK, 0.3),
    "setitem": _overwrite,
    "through a view": _through_view,
}


@dataclass(frozen=True)
class Line:
    """``pool.append(name(pool[x], pool[y]))``."""

    kind: str
    name: str
    x: int
    y: int


class Program(nn.Module):
    """Runs its lines one after the other on a pool of tensors, and sums up what the last ones made."""

    def __init__(self, lines: list[Line]) -> None:
        super().__init__()
        self.lines = lines
        names = sorted({line.name for line in lines if line.kind == "module"})
        self.parts = nn.ModuleList([MODULES[name]() for name in names])
        self.index = {name: i for i, name in enumerate(names)}
        self.head = nn.Linear(N, 2)

    def forward(self, x: Tensor) -> Tensor:
        pool: list[Tensor] = [x]
        for line in self.lines:
            a, b = pool[line.x % len(pool)], pool[line.y % len(pool)]
            if line.kind == "module":
                made: Any = self.parts[self.index[line.name]](a)
            elif line.kind == "unary":
                made = UNARY[line.name](a)
            elif line.kind == "binary":
                made = BINARY[line.name](a, b)
            else:
                a = a if a.is_contiguous() and 0 not in a.stride() else a.clone()
                made = IN_PLACE[line.name](a, b.clone() if a is b else b)
            pool.append(made)
        total = pool[-1]
        for tensor in pool[-3:-1]:
            total = total + tensor
        return self.head(total)


lines = st.one_of(
    st.builds(Line, st.just("module"), st.sampled_from(sorted(MODULES)), st.integers(0, 7), st.just(0)),
    st.builds(Line, st.just("unary"), st.sampled_from(sorted(UNARY)), st.integers(0, 7), st.just(0)),
    st.builds(Line, st.just("binary"), st.sampled_from(sorted(BINARY)), st.integers(0, 7), st.integers(0, 7)),
    st.builds(
        Line, st.just("in place"), st.sampled_from(sorted(IN_PLACE)), st.integers(0, 7), st.integers(0, 7)
    ),
)
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


def plain_value(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x.clone())


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
    expected = plain_value(model, x)
    if not torch.isfinite(expected).all() or expected.abs().max() > 1e4:
        return
    unchanged = Unchanged(model)
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
            td = TensorDict({"input": x.clone()}, batch_size=batch)
            with lrp.prepare(model) as explained, measured() as seen:
                for _ in range(2):  # the second run knows what the first has found out
                    td = explained(td)
            assert torch.equal(td["input"], x)
            assert torch.equal(td["output"], expected), f"{flow}, ledger={ledger}"
            found[flow, ledger] = td["attr", "input"]
            if ledger:
                scale = max(seen["largest"], 1e-6)
                stopped = sum(e.of("stabiliser").abs().max().item() for e in explained.ledger.entries)
                note(f"{flow}: scale {scale:.3g}, target {td['ledger', 'target'].tolist()}")
                if scale > 1e4 * expected.abs().max():
                    return  # numbers cancel somewhere, and what is left is rounding
                assert td["ledger", "gap"].abs().max() <= 1e-9 * scale
    unchanged.check()
    for flow in FLOWS:
        assert (found[flow, True] - found[flow, False]).abs().max() <= 1e-9 * scale
    # Relevance of a value of zero stops in the gradient convention, at the stabiliser; else the flows agree.
    if stopped <= 1e-8 * scale:
        assert (found["relevance", True] - found["gradient", True]).abs().max() <= 1e-6 * scale


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
