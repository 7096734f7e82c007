"""What the model masks out brings no NaN into relevance; what does otherwise is an error that names where it arose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import Tensor, nn

from tdhook import LRP, Target
from tdhook.attribution import Gradient, GradientTimesInput

NAN, INF = torch.nan, torch.inf
MASK = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1], [0, 0, 0, 0]]).bool()
LARGE = torch.tensor([1.0, 1.0, 1.0, 1e4])


class Around(nn.Module):
    """``head(f(x))``, or of a layer before it."""

    def __init__(self, f: Callable[[Tensor], Tensor], x: Tensor, inside: bool) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.f = f
        self.first = nn.Linear(4, 4) if inside else nn.Identity()
        width = f(self.first(x)).flatten(1).shape[1]
        self.head = nn.Sequential(nn.Linear(width, 4), nn.GELU(), nn.Linear(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.f(self.first(x)).flatten(1))


def sample(value: float | None = None) -> Tensor:
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    if value is not None:
        x[0, 3] = value
    return x


def explain(
    model: nn.Module, x: Tensor, flow: str = "gradient", composite: str = "attn_lrp", **options: object
):
    method = LRP(composite, target=Target("output", 0), flow=flow, **options)
    with method.prepare(model) as explained:
        return explained(TensorDict({"input": x.clone()}, [len(x)]))


MISSING: dict[str, Callable[[Tensor], Tensor]] = {
    "where": lambda x: torch.where(x.isnan(), 0.0, x),
    "nan_to_num": lambda x: x.nan_to_num(),
    "nan_to_num to another": lambda x: x.nan_to_num(5.0),
    "masked_fill": lambda x: x.masked_fill(x.isnan(), 0.0),
    "after a layer": lambda x: torch.where(x.isnan(), 0.0, (2 * x).exp().sqrt() + x),
    "after activations": lambda x: torch.where(x.isnan(), 0.0, F.gelu(x) + x.tanh() * x.sigmoid()),
    "nansum": lambda x: torch.cat([x.nansum(-1, keepdim=True), x[:, :2]], -1),
    "nanmean": lambda x: torch.cat([x.nanmean(-1, keepdim=True), x[:, :2]], -1),
    "fmax": lambda x: torch.fmax(x, torch.zeros(())),
    "whole rows": lambda x: torch.where(
        x.isnan().any(-1, keepdim=True), 0.0, F.layer_norm(x @ torch.ones(4, 4).triu(), [4])
    ),
}


def attention(h: Tensor) -> Tensor:
    scores = h[:, :, None] * h[:, None, :]
    return scores.masked_fill(MASK, -INF).softmax(-1) @ h[:, :, None]


def fused(h: Tensor) -> Tensor:
    q = h[:, None, :, None].expand(-1, 1, -1, 4).contiguous()
    return F.scaled_dot_product_attention(q, 1.5 * q, 0.5 * q, attn_mask=~MASK)[:, 0, 1:, 0]


INSIDE: dict[str, Callable[[Tensor], Tensor]] = {
    "log of zero": lambda h: h.relu().log().clamp(min=-10.0),
    "an exponential that is too large": lambda h: (h.abs() * LARGE).exp().clamp(max=10.0),
    "that squashed": lambda h: (h.abs() * LARGE).exp().tanh(),
    "roots of negative numbers": lambda h: torch.where(h > 0, h.sqrt(), 0.0),
    "logarithms of negative numbers": lambda h: torch.where(h > 0, h.log(), 0.0),
    "quotients by zero": lambda h: torch.where(h > 0, h / h.relu(), 0.0),
    "reciprocals of zero": lambda h: torch.where(h > 0, 1 / h.relu(), 0.0),
    "a row of attention": lambda h: attention(h)[:, 1:],
    "a row of fused attention": fused,
    "a row of attention that is replaced": lambda h: attention(h).nan_to_num(),
    "a row of attention with others behind": lambda h: F.layer_norm(
        attention(h).expand(-1, -1, 4) * LARGE, [4]
    )[:, 1:],
}


@pytest.mark.parametrize("flow", ["relevance", "gradient"])
@pytest.mark.parametrize("composite", ["attn_lrp", "epsilon_plus"])
@pytest.mark.parametrize("name", [*MISSING, *INSIDE])
def test_what_is_masked_out_has_no_relevance(name: str, composite: str, flow: str) -> None:
    missing = name in MISSING
    x = sample(NAN if missing else None)
    model = Around({**MISSING, **INSIDE}[name], x, inside=not missing)
    td = explain(model, x, flow, composite, ledger=True)
    relevance = td["attr", "input"]
    assert relevance.isfinite().all() and (relevance[1] != 0).any()
    assert not missing or relevance[0, 3] == 0
    assert td["ledger", "gap"].abs().max() < 1e-5
    bare = explain(model, x, flow, composite)["attr", "input"]
    torch.testing.assert_close(bare, relevance)


@pytest.mark.parametrize("name", MISSING)
def test_it_is_that_of_a_number_in_its_place(name: str) -> None:
    """Of the other sample it is what it would be alone."""
    x = sample(NAN)
    model = Around(MISSING[name], x, inside=False)
    together, alone = (explain(model, values)["attr", "input"] for values in (x, x[1:]))
    torch.testing.assert_close(together[1:], alone)


def test_of_several_targets_at_once() -> None:
    x = sample(NAN)
    model = Around(MISSING["after activations"], x, inside=False)
    with LRP("attn_lrp", target=Target("output", [0, 1])).prepare(model) as explained:
        found = explained(TensorDict({"input": x}, [2]))["attr", "input"]
    assert found.isfinite().all()
    torch.testing.assert_close(found[:, 0], explain(model, x)["attr", "input"])


@pytest.mark.parametrize("method", [Gradient, GradientTimesInput])
def test_of_plain_gradients(method: type) -> None:
    x = sample(NAN)
    model = Around(MISSING["after activations"], x, inside=False)
    with method(target=Target("output", 0)).prepare(model) as explained:
        found = explained(TensorDict({"input": x}, [2]))["attr", "input"]
    assert found.isfinite().all() and found[0, 3] == 0


def test_in_a_compiled_explanation() -> None:
    x = sample(NAN)
    model = Around(MISSING["after activations"], x, inside=False)
    compiled = explain(model, x, compile={"backend": "aot_eager"})["attr", "input"]
    torch.testing.assert_close(compiled, explain(model, x)["attr", "input"])


class Steep(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.square().sum(-1, keepdim=True) ** 0.5


def test_gradients_that_are_infinite_are_refused() -> None:
    text = (
        "the relevance of 'input' is NaN or infinite though the target is finite: it arises in the backward pass of "
        "the operation `Sqrt`; mask out"
    )
    with (
        pytest.raises(ValueError, match=text),
        Gradient(target=Target("output", 0)).prepare(Root()) as explained,
    ):
        explained(TensorDict({"input": torch.zeros(1, 2)}, [1]))


class Growing(nn.Module):
    """Twelve differences that are small beside what they are of: each multiplies relevance by 4,000."""

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(12):
            x = torch.sigmoid(x - 0.4999)
        return x


@pytest.mark.parametrize("flow", ["relevance", "gradient"])
def test_relevance_that_outgrows_single_precision_is_refused_and_double_precision_holds_it(flow: str) -> None:
    td = TensorDict({"input": torch.full((1, 2), 0.5)}, [1])
    with LRP("attn_lrp", flow=flow, target=Target("output", 0)).prepare(Growing()) as explained:
        with pytest.raises(
            ValueError, match=r"`(Sub|sigmoid)`; .*beyond 3.4e\+38: explain the model in float64"
        ):
            explained(td)
        found = explained(td.double())["attr", "input"]
    assert found.isfinite().all() and found.abs().max() > 3.4e38


class Root(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sqrt()


@dataclass
class Answer:
    value: Tensor


class Inner(nn.Module):
    """Returns NaN, in some shape."""

    def __init__(self, shape: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.shape = shape
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> object:
        return self.shape((self.layer(x) * 0).log() * 0)


SHAPES: dict[str, tuple[Callable[[Tensor], object], Callable[[object], Tensor]]] = {
    "a tensor": (lambda x: x, lambda y: y),
    "a tuple": (lambda x: (x, None), lambda y: y[0]),
    "a dictionary": (lambda x: {"a": {"b": x}}, lambda y: y["a"]["b"]),
    "a dataclass": (Answer, lambda y: y.value),
    "a TensorDict": (lambda x: TensorDict({"a": x}, [len(x)]), lambda y: y["a"]),
}


class Outer(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.shape, self.back = SHAPES[name]
        self.before, self.inner, self.head = nn.Linear(4, 4), Inner(self.shape), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.back(self.inner(self.before(x))))


@pytest.mark.parametrize("name", SHAPES)
def test_the_module_is_named_whatever_it_returns(name: str) -> None:
    text = r"module 'inner' \(Inner\) is the first to return such a value, made by the operation `log`"
    with pytest.raises(ValueError, match=text):
        explain(Outer(name), sample())


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        padding = torch.ones(x.shape[:2], dtype=torch.bool)
        return self.head(self.attention(h, h, h, key_padding_mask=padding)[0].mean(1))


def test_attention_to_nothing_but_padding() -> None:
    with pytest.raises(ValueError, match=r"module 'attention' \(MultiheadAttention\) is the first to return"):
        explain(Attending().eval(), torch.randn(2, 3, 4))


class Masked(nn.Module):
    """Its scores are masked by infinities, rightly; what it returns overflows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).masked_fill(torch.tensor([False, True, False, False]), -INF).softmax(-1)
        return self.second(h).exp() / (h[:, :2] - h[:, :2])


def test_infinities_that_are_given_are_not_to_blame() -> None:
    with pytest.raises(
        ValueError, match=r"the model itself \(Masked\) is the first .* by the operation `div`"
    ):
        explain(Masked(), sample())
