"""Overloads of ``torch.ops.aten``, by which exported graphs compute: as the functions that they are."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import Tensor, nn

from tdhook import LRP, Target
from tdhook.rules import EpsilonRule
from tdhook.selectors import Op

from .cases import const
from .checks import TINY, assert_same, every_flow, relevance_of

aten = torch.ops.aten
W, SCALE, SHIFT = const(6, 6), const(6, seed=1, low=0.5), const(6, seed=2)


def heads(h: Tensor) -> Tensor:
    return h.reshape(-1, 1, 3, 2)


SAME = {
    "linear": (lambda h: aten.linear.default(h, W, SHIFT), lambda h: F.linear(h, W, SHIFT)),
    "addmm": (lambda h: aten.addmm.default(SHIFT, h, W), lambda h: torch.addmm(SHIFT, h, W)),
    "activations": (
        lambda h: aten.tanh.default(h) + aten.relu.default(h) + aten.gelu.default(h),
        lambda h: h.tanh() + h.relu() + F.gelu(h),
    ),
    "packets": (lambda h: aten.tanh(aten.mul(h, SCALE)), lambda h: (h * SCALE).tanh()),
    "numbers": (
        lambda h: aten.div.Scalar(aten.sub.Tensor(h, SHIFT, alpha=2), 3.0),
        lambda h: torch.sub(h, SHIFT, alpha=2) / 3.0,
    ),
    "softmax": (lambda h: aten._softmax.default(h, -1, False), lambda h: h.softmax(-1)),
    "by name": (
        lambda h: aten.softmax.int(self=aten.div.Tensor(self=h, other=SCALE), dim=-1),
        lambda h: (h / SCALE).softmax(-1),
    ),
    "in place": (
        lambda h: aten.mul_.Tensor(aten.add_.Tensor(h * 1, SHIFT), SCALE),
        lambda h: (h + SHIFT) * SCALE,
    ),
    "written to out": (lambda h: aten.mul.out(h, SCALE, out=torch.empty_like(h)), lambda h: h * SCALE),
    "moves": (
        lambda h: aten._unsafe_view.default(
            aten.slice.Tensor(aten.view_copy.default(h, [-1, 2, 3]), 1, 1), [-1, 3]
        ),
        lambda h: h.view(-1, 2, 3)[:, 1:].reshape(-1, 3),
    ),
    "layer norm": (
        lambda h: aten.native_layer_norm.default(h, [6], SCALE, SHIFT, 1e-5)[0],
        lambda h: F.layer_norm(h, [6], SCALE, SHIFT),
    ),
    "group norm": (
        lambda h: aten.native_group_norm.default(h, SCALE, SHIFT, h.shape[0], 6, 1, 2, 1e-5)[0],
        lambda h: F.group_norm(h, 2, SCALE, SHIFT),
    ),
    "batch norm": (
        lambda h: aten._native_batch_norm_legit_no_training.default(h, SCALE, SHIFT, SHIFT, SCALE, 0.1, 1e-5)[
            0
        ],
        lambda h: F.batch_norm(h, SHIFT, SCALE, SCALE, SHIFT),
    ),
    "batch norm of the batch": (
        lambda h: aten.native_batch_norm.default(
            h, SCALE, SHIFT, SHIFT.clone(), SCALE.clone(), True, 0.1, 1e-5
        )[0],
        lambda h: F.batch_norm(h, None, None, SCALE, SHIFT, training=True),
    ),
    "batch norm without statistics": (
        lambda h: aten._native_batch_norm_legit.no_stats(h, SCALE, SHIFT, True, 0.1, 1e-5)[0],
        lambda h: F.batch_norm(h, None, None, SCALE, SHIFT, training=True),
    ),
    "attention": (
        lambda h: aten._scaled_dot_product_flash_attention_for_cpu.default(
            heads(h), heads(h), heads(h), 0.0, True
        )[0],
        lambda h: F.scaled_dot_product_attention(heads(h), heads(h), heads(h), is_causal=True),
    ),
    "causal attention, by name": (
        lambda h: aten._scaled_dot_product_flash_attention_for_cpu.default(
            heads(h), heads(h), heads(h), is_causal=True
        )[0],
        lambda h: F.scaled_dot_product_attention(heads(h), heads(h), heads(h), is_causal=True),
    ),
    "causal attention in steps, by name": (
        lambda h: aten._scaled_dot_product_attention_math.default(
            heads(h), heads(h), heads(h), is_causal=True
        )[0],
        lambda h: F.scaled_dot_product_attention(heads(h), heads(h), heads(h), is_causal=True),
    ),
    "attention in steps": (
        lambda h: aten._scaled_dot_product_attention_math.default(heads(h), heads(h), heads(h), scale=0.5)[0],
        lambda h: F.scaled_dot_product_attention(heads(h), heads(h), heads(h), scale=0.5),
    ),
    "assignment": (
        lambda h: aten.copy.default(torch.zeros(1, 6).double().expand_as(h), h) * 2,
        lambda h: h * 2,
    ),
}


@every_flow
@pytest.mark.parametrize("case", SAME)
def test_explained_as_the_function_that_it_is(case: str, flow: str) -> None:
    overload, function = SAME[case]
    batched = "of the batch" in case or "without statistics" in case
    tolerance = 1e-6 if batched else 1e-9
    ledger = not batched
    got = relevance_of(overload, flow, ledger=ledger)
    assert_same(got, relevance_of(function, flow, ledger=ledger), tolerance)


@every_flow
def test_dropout_drops_what_it_dropped(flow: str) -> None:
    got = relevance_of(lambda h: aten.native_dropout.default(h, 0.5, True)[0], flow)
    assert_same(got, relevance_of(lambda h: F.dropout(h, 0.5, True), flow), 1e-9)


def test_attention_that_drops_in_a_kernel_is_refused() -> None:
    def f(h: Tensor) -> Tensor:
        return aten._scaled_dot_product_attention_math.default(heads(h), heads(h), heads(h), None, 0.5)[0]

    with pytest.raises(
        NotImplementedError, match=r"drops attention weights.*explain the model in evaluation mode"
    ):
        relevance_of(f, "relevance")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 3, 3, padding=1)
        self.norm, self.first, self.last = nn.LayerNorm(6), nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x)).mean(1)
        y = torch.cond(y.sum() > -100, lambda y: y.tanh(), lambda y: y + 1, (y,))
        return self.last(torch.relu(self.first(y))).softmax(-1)


@pytest.mark.filterwarnings("ignore")  # of torch.export
@every_flow
@pytest.mark.parametrize("decomposed", [False, True], ids=["exported", "decomposed"])
def test_exported_models(decomposed: bool, flow: str) -> None:
    torch.manual_seed(0)
    model, x = Block().double().eval(), torch.randn(3, 2, 6).double()
    program = torch.export.export(model, (x,))
    exported = (program.run_decompositions() if decomposed else program).module()
    composite = [*TINY, (nn.Conv1d, EpsilonRule(1e-12)), (Op("linear"), EpsilonRule(1e-12))]
    method = LRP(composite, target=Target("output", 0), flow=flow, ledger=True, on_unmatched="raise")
    expected, got = (method.wrap(m)(TensorDict({"input": x}, batch_size=[3])) for m in (model, exported))
    assert_same(got["attr", "input"], expected["attr", "input"], 1e-8)
    assert torch.allclose(got["output"], expected["output"], rtol=1e-12)
    assert got["ledger", "gap"].abs().max() < 1e-9
