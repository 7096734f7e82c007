"""What the default rules of operations must give, written from their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdhook.rules import EpsilonRule

from .cases import const
from .checks import Calls, assert_balanced, assert_same, every_flow, explained

WIDTH = 12
EXACT = [(nn.Linear, EpsilonRule(0.0))]


def relevance_at(f, flow: str, x: Tensor, composite=EXACT):
    """``h``, the output of the layer before ``f``, with its relevance and that of ``f(h)``, which arrives at ``f``."""
    torch.manual_seed(0)
    model = Calls(f, x)
    td, module = explained(model, x, flow, composite, input_modules=["trunk"], use_inputs=True)
    assert_balanced(td, module)
    h = model.trunk(x).detach()
    made = f(h.clone()).detach().reshape(len(x), -1)
    arrives = made * model.head.weight[0].detach()
    return h.numpy(), td["attr", "trunk"].numpy(), arrives.numpy()


def values(batch: int = 3, width: int = WIDTH, seed: int = 0) -> Tensor:
    x = torch.randn(batch, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x + 0.3 * x.sign()


def assert_close(found, expected) -> None:
    scale = max(np.abs(expected).max(), 1e-12)
    assert np.abs(found - expected).max() <= 1e-9 * scale


# Sums, means, products, quotients.


@every_flow
def test_a_sum_shares_by_contribution(flow: str) -> None:
    h, found, r = relevance_at(lambda h: h[:, :6] + h[:, 6:], flow, values())
    a, b = h[:, :6], h[:, 6:]
    assert_close(found, np.concatenate([a / (a + b) * r, b / (a + b) * r], 1))


@every_flow
def test_a_shortcut_shares_between_branch_and_identity(flow: str) -> None:
    weight = const(WIDTH, WIDTH)

    def block(h: Tensor) -> Tensor:
        return h + torch.tanh(F.linear(h, weight))

    h, found, r = relevance_at(block, flow, values())
    z = h @ weight.numpy().T
    branch = np.tanh(z)
    per_output = r / (h + branch)
    expected = h * per_output
    for b in range(len(h)):
        for j in range(WIDTH):
            expected[b] += h[b] * weight.numpy()[j] / z[b, j] * (branch[b, j] * per_output[b, j])
    assert_close(found, expected)


@every_flow
def test_a_mean_shares_by_size(flow: str) -> None:
    h, found, r = relevance_at(lambda h: h.mean(-1, keepdim=True), flow, values())
    assert_close(found, h / h.sum(-1, keepdims=True) * r)


@every_flow
def test_dueling_heads_share_by_contribution(flow: str) -> None:
    h, found, r = relevance_at(
        lambda h: h[:, :1] + h[:, 1:] - h[:, 1:].mean(-1, keepdim=True), flow, values()
    )
    value, advantage = h[:, :1], h[:, 1:]
    z = value + advantage - advantage.mean(-1, keepdims=True)
    s = r / z
    expected = np.concatenate(
        [value * s.sum(-1, keepdims=True), advantage * (s - s.mean(-1, keepdims=True))], 1
    )
    assert_close(found, expected)


@every_flow
@pytest.mark.parametrize(
    "write", [lambda a, b: a * b, lambda a, b: torch.einsum("bi,bi->bi", a, b)], ids=["mul", "einsum"]
)
def test_a_product_is_halved(write, flow: str) -> None:
    _, found, r = relevance_at(lambda h: write(h[:, :6], h[:, 6:]), flow, values())
    assert_close(found, np.concatenate([r / 2, r / 2], 1))


@every_flow
def test_a_matrix_product_is_halved_by_contribution(flow: str) -> None:
    h, found, r = relevance_at(lambda h: h[:, :6].view(-1, 2, 3) @ h[:, 6:].view(-1, 3, 2), flow, values())
    expected = np.zeros_like(h)
    for b in range(len(h)):
        x, y, z = h[b, :6].reshape(2, 3), h[b, 6:].reshape(3, 2), r[b].reshape(2, 2)
        out = expected[b]
        for i in range(2):
            for k in range(2):
                for j in range(3):
                    share = x[i, j] * y[j, k] / (x[i] @ y[:, k]) * z[i, k]
                    out[3 * i + j] += share / 2
                    out[6 + 2 * j + k] += share / 2
    assert_close(found, expected)


@every_flow
@pytest.mark.parametrize(
    "write",
    [
        lambda a, b: a / b,
        lambda a, b: a * b.reciprocal(),
        lambda a, b: torch.div(a, b),
        lambda a, b: (1 / b) * a,
    ],
    ids=["operator", "reciprocal", "function", "one over"],
)
def test_the_denominator_of_a_quotient_is_constant(write, flow: str) -> None:
    _, found, r = relevance_at(lambda h: write(h[:, :6], h[:, 6:]), flow, values())
    assert_close(found, np.concatenate([r, 0 * r], 1))


@every_flow
@pytest.mark.parametrize("name", ["relu", "tanh", "sigmoid", "exp", "square", "gelu"])
def test_activations_pass(name: str, flow: str) -> None:
    f = getattr(torch, name, None) or getattr(F, name)
    _, found, r = relevance_at(f, flow, values())
    assert_close(found, r)


@every_flow
def test_what_is_largest_takes_all(flow: str) -> None:
    h, found, r = relevance_at(lambda h: F.max_pool1d(h[:, None], 3), flow, values())
    expected = np.zeros_like(h)
    for b in range(len(h)):
        for i in range(4):
            expected[b, 3 * i + np.argmax(h[b, 3 * i : 3 * i + 3])] = r[b, i]
    assert_close(found, expected)


# Softmax and normalisation.


@every_flow
def test_softmax(flow: str) -> None:
    """AttnLRP, Proposition 3.1: ``R_i = x_i (R_i - s_i sum_j R_j)``."""
    h, found, r = relevance_at(lambda h: h.view(-1, 3, 4).softmax(-1), flow, values())
    x, r = h.reshape(-1, 3, 4), r.reshape(-1, 3, 4)
    s = np.exp(x) / np.exp(x).sum(-1, keepdims=True)
    assert_close(found.reshape(-1, 3, 4), x * (r - s * r.sum(-1, keepdims=True)))


def _standardise(x: Tensor, axes, eps: float = 1e-5) -> Tensor:
    return (x - x.mean(axes, keepdim=True)) / (x.var(axes, correction=0, keepdim=True) + eps).sqrt().detach()


_CW, _CB = const(4, seed=1), const(4, seed=2)
_FW, _FB = const(WIDTH, seed=3), const(WIDTH, seed=4)


def _per_channel(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x * weight[:, None] + bias[:, None]


NORMS = {
    "layer": (lambda h: F.layer_norm(h, (WIDTH,), _FW, _FB), lambda h: _standardise(h, -1) * _FW + _FB),
    "layer over two axes": (
        lambda h: F.layer_norm(h.view(-1, 4, 3), (4, 3)),
        lambda h: _standardise(h.view(-1, 4, 3), (-2, -1)),
    ),
    "group": (
        lambda h: F.group_norm(h.view(-1, 4, 3), 2, _CW, _CB),
        lambda h: _per_channel(_standardise(h.view(-1, 2, 6), -1).view(-1, 4, 3), _CW, _CB),
    ),
    "instance": (
        lambda h: F.instance_norm(h.view(-1, 4, 3), weight=_CW, bias=_CB),
        lambda h: _per_channel(_standardise(h.view(-1, 4, 3), -1), _CW, _CB),
    ),
    "batch, training": (
        lambda h: F.batch_norm(h.view(-1, 4, 3), None, None, _CW, _CB, True),
        lambda h: _per_channel(_standardise(h.view(-1, 4, 3), (0, 2)), _CW, _CB),
    ),
    "rms": (
        lambda h: F.rms_norm(h, (WIDTH,), _FW, 1e-5),
        lambda h: h / (h.square().mean(-1, keepdim=True) + 1e-5).sqrt().detach() * _FW,
    ),
    "rms, default eps": (
        lambda h: F.rms_norm(h, (WIDTH,)),
        lambda h: h / (h.square().mean(-1, keepdim=True) + torch.finfo(h.dtype).eps).sqrt().detach(),
    ),
    "module LayerNorm": (nn.LayerNorm(WIDTH).double(), lambda h: _standardise(h, -1)),
    "module RMSNorm": (
        nn.RMSNorm(WIDTH, eps=1e-2).double(),
        lambda h: h / (h.square().mean(-1, keepdim=True) + 1e-2).sqrt().detach(),
    ),
    "module GroupNorm": (
        nn.Sequential(nn.Unflatten(-1, (4, 3)), nn.GroupNorm(2, 4).double()),
        lambda h: _standardise(h.view(-1, 2, 6), -1),
    ),
    "layer, by hand": (
        lambda h: (h - h.mean(-1, keepdim=True)) / torch.sqrt(h.var(-1, keepdim=True, correction=0) + 1e-5),
        lambda h: _standardise(h, -1),
    ),
    "rms, by hand": (
        lambda h: _FW * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)),
        lambda h: h / (h.square().mean(-1, keepdim=True) + 1e-5).sqrt().detach() * _FW,
    ),
}


@every_flow
@pytest.mark.parametrize("name", NORMS)
def test_normalisation_holds_its_deviation_constant(name: str, flow: str) -> None:
    """In the gradient convention, autograd with the statistics detached: ``R_x = x * J^T(R_z / z)``."""
    write, reference = NORMS[name]
    if isinstance(write, nn.Module):
        write.requires_grad_(False)
    h, found, r = relevance_at(write, flow, values())
    x = torch.from_numpy(h).requires_grad_()
    z = reference(x).reshape(len(h), -1)
    (g,) = torch.autograd.grad(z, x, torch.from_numpy(r) / z.detach())
    assert_close(found, (x * g).detach().numpy())


@every_flow
def test_hand_written_rms_norm_is_that_of_torch(flow: str) -> None:
    class OwnRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(_FW.clone())

        def forward(self, x: Tensor) -> Tensor:
            return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))

    ours, theirs = OwnRMSNorm(), nn.RMSNorm(WIDTH, eps=1e-6, dtype=torch.float64)
    theirs.weight.data.copy_(_FW)
    found = []
    for norm in (ours, theirs):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(WIDTH, WIDTH), norm, nn.Linear(WIDTH, 2)).double()
        td, module = explained(model, values(), flow)
        assert_balanced(td, module)
        found.append(td["attr", "input"])
    assert_same(*found, 1e-9)


# Attention.


def _explicit_attention(q, k, v, r, bias=None):
    """Relevance of query, key and value from Propositions 3.1 and 3.3, by loops over ``[positions, features]``."""
    scale = 1 / np.sqrt(q.shape[-1])
    logits = np.zeros((len(q), len(k)))
    for i in range(len(q)):
        for j in range(len(k)):
            logits[i, j] = sum(q[i] * k[j]) * scale
    masked = logits if bias is None else logits + bias
    weights = np.exp(masked - masked.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    out = weights @ v
    r_v, r_weights = np.zeros_like(v), np.zeros_like(weights)
    for i in range(len(q)):
        for d in range(v.shape[1]):
            for j in range(len(k)):
                share = weights[i, j] * v[j, d] / out[i, d] * r[i, d] / 2
                r_v[j, d] += share
                r_weights[i, j] += share
    r_q, r_k = np.zeros_like(q), np.zeros_like(k)
    for i in range(len(q)):
        for j in range(len(k)):
            if np.isinf(masked[i, j]):
                continue
            r_masked = masked[i, j] * (r_weights[i, j] - weights[i, j] * r_weights[i].sum())
            # Of what the sum of logits and mask is given, the mask keeps its share.
            r_logit = r_masked * logits[i, j] / masked[i, j]
            for d in range(q.shape[1]):
                share = q[i, d] * k[j, d] * scale / logits[i, j] * r_logit / 2
                r_q[i, d] += share
                r_k[j, d] += share
    return r_q, r_k, r_v


LENGTH, HEADS, DEPTH = 3, 2, 2
_FLOAT_MASK = const(LENGTH, LENGTH, seed=8)
_BOOL_MASK = torch.tensor([[True, False, True], [True, True, False], [True, True, True]])
_CAUSAL = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
ATTENTION = {
    "plain": ({}, None),
    "causal": ({"is_causal": True}, _CAUSAL),
    "mask": ({"attn_mask": _BOOL_MASK}, _BOOL_MASK),
    "additive mask": ({"attn_mask": _FLOAT_MASK}, _FLOAT_MASK),
    "grouped queries": ({"enable_gqa": True}, None),
    "grouped and causal": ({"enable_gqa": True, "is_causal": True}, _CAUSAL),
    "one head of values": ({"enable_gqa": True, "attn_mask": _FLOAT_MASK}, _FLOAT_MASK),
}


def _additive(mask: Tensor | None):
    if mask is None or mask.is_floating_point():
        return None if mask is None else mask.numpy()
    return np.where(mask.numpy(), 0.0, -np.inf)


@every_flow
@pytest.mark.parametrize("name", ATTENTION)
def test_attention_is_the_composition_of_its_parts(name: str, flow: str) -> None:
    kwargs, mask = ATTENTION[name]
    grouped = kwargs.get("enable_gqa", False)
    heads = (4, 2, 2) if grouped else (HEADS,) * 3
    sizes = [n * LENGTH * DEPTH for n in heads]

    def parts(h):
        cut = np.cumsum([0, *sizes])
        return [h[:, a:b].reshape(-1, n, LENGTH, DEPTH) for a, b, n in zip(cut, cut[1:], heads, strict=False)]

    h, found, r = relevance_at(
        lambda h: F.scaled_dot_product_attention(*parts(h), **kwargs), flow, values(2, sum(sizes))
    )
    q, k, v = parts(h)
    r = r.reshape(q.shape)
    expected = [np.zeros_like(x) for x in (q, k, v)]
    for b in range(len(h)):
        for i in range(heads[0]):
            j = i // (heads[0] // heads[1])
            shares = _explicit_attention(q[b, i], k[b, j], v[b, j], r[b, i], _additive(mask))
            for into, at, share in zip(expected, (i, j, j), shares, strict=True):
                into[b, at] += share
    assert_close(found, np.concatenate([e.reshape(len(h), -1) for e in expected], 1))


@every_flow
@pytest.mark.parametrize("mask", [None, _CAUSAL], ids=["plain", "causal"])
def test_attention_written_out_gives_the_same(mask, flow: str) -> None:
    def fused(h: Tensor) -> Tensor:
        q, k, v = h.view(-1, 3, HEADS, LENGTH, DEPTH).unbind(1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    def written(h: Tensor) -> Tensor:
        q, k, v = h.view(-1, 3, HEADS, LENGTH, DEPTH).unbind(1)
        logits = torch.matmul(q, k.transpose(-1, -2)) / DEPTH**0.5
        logits = logits if mask is None else logits.masked_fill(~mask, float("-inf"))
        return F.softmax(logits, dim=-1) @ v

    x = values(2, 3 * HEADS * LENGTH * DEPTH)
    (_, a, _), (_, b, _) = (relevance_at(f, flow, x) for f in (fused, written))
    assert_close(a, b)


# Linear layers as operations.


@every_flow
def test_a_linear_layer_as_an_operation_is_one_as_a_module(flow: str) -> None:
    layer = nn.Linear(WIDTH, 5).double().requires_grad_(False)
    x = values()
    (_, a, _), (_, b, _) = (
        relevance_at(lambda h, f=f: f(h), flow, x)
        for f in (layer, lambda h: F.linear(h, layer.weight, layer.bias))
    )
    assert_close(a, b)
