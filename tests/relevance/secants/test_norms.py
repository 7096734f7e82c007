"""Normalisation: the product of what is centred and of the inverse deviation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdhook.relevance.secants.norms import held, normalised

from .pairs import assert_all_arrives, integrated, pair_of, random_grads

MODULES = {
    "layer norm": lambda: nn.LayerNorm(6),
    "of two axes": lambda: nn.LayerNorm((4, 6)),
    "plain layer norm": lambda: nn.LayerNorm(6, elementwise_affine=False),
    "rms norm": lambda: nn.RMSNorm(6, eps=1e-3),
    "rms norm without eps": lambda: nn.RMSNorm(6),
    "group norm": lambda: nn.GroupNorm(2, 4),
    "instance norm": lambda: nn.InstanceNorm1d(4, affine=True),
    "batch norm": lambda: nn.BatchNorm1d(4),
}


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    module = MODULES[name]().double()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


def draw(*shape: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(*shape, dtype=torch.float64), 2 * torch.randn(*shape, dtype=torch.float64) + 0.3


@pytest.mark.parametrize("name", sorted(MODULES))
def test_all_arrives(name: str) -> None:
    module = made(name)
    x, start = draw(3, 4, 6)
    pair = pair_of(type(module).__name__, module, [x], [start], module=module)
    grads = random_grads(pair)
    found = normalised(pair, grads)
    assert_all_arrives(pair, grads, found)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_where_both_are_the_same_it_is_the_derivative(name: str) -> None:
    module = made(name)
    x, _ = draw(3, 4, 6)
    pair = pair_of(type(module).__name__, module, [x], [x], module=module)
    grads = random_grads(pair)
    assert torch.allclose(normalised(pair, grads)[0], integrated(pair, grads, 1)[0], atol=1e-12)


def test_by_the_definition() -> None:
    """With ``z = c r``: ``dz = r_mid dc + c_mid dr``, written out value by value."""
    x, start = draw(1, 5)
    x, start = x[0], start[0]
    eps = 1e-5
    c, c0 = x - x.mean(), start - start.mean()
    v, v0 = c.square().mean() + eps, c0.square().mean() + eps
    r, r0 = v**-0.5, v0**-0.5
    slope = (r - r0) / (v - v0)
    centre = torch.eye(5).double() - 1 / 5
    jacobian = (r + r0) / 2 * centre + torch.outer((c + c0) / 2, slope * (c + c0) / 5) @ centre
    pair = pair_of("layer_norm", F.layer_norm, [x[None], (5,)], [start[None], (5,)])
    g = torch.randn(1, 5, dtype=torch.float64)
    assert torch.allclose(normalised(pair, [g])[0], g @ jacobian)
    holding = (r + r0) / 2 * centre
    assert torch.allclose(held(pair, [g])[0], g @ holding)


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm", "group_norm", "batch_norm"])
def test_operations(name: str) -> None:
    x, start = draw(3, 4, 6)
    w, b = torch.randn(6).double(), torch.randn(6).double()
    per_channel = torch.randn(4).double(), torch.randn(4).double()
    function, rest = {
        "layer_norm": (F.layer_norm, ((6,), w, b, 1e-3)),
        "rms_norm": (F.rms_norm, ((6,), w, 1e-3)),
        "group_norm": (torch.group_norm, None),
        "batch_norm": (torch.batch_norm, (*per_channel, None, None, True, 0.1, 1e-5, False)),
    }[name]
    if rest is None:
        function = lambda x, n, w, b: F.group_norm(x, n, w, b)  # noqa: E731
        rest = (2, *per_channel)
    pair = pair_of(name, function, [x, *rest], [start, *rest], live=[0])
    grads = random_grads(pair)
    assert_all_arrives(pair, grads, normalised(pair, grads))


def test_some_rows_are_the_same() -> None:
    module = made("layer norm")
    x, start = draw(3, 6)
    start[1] = x[1]
    pair = pair_of("LayerNorm", module, [x], [start], module=module)
    grads = random_grads(pair)
    found = normalised(pair, grads)
    assert found[0].isfinite().all()
    assert_all_arrives(pair, grads, found)


def test_values_without_deviation() -> None:
    module = made("layer norm")
    x, start = draw(3, 6)
    pair = pair_of("LayerNorm", module, [x], [torch.zeros_like(start)], module=module)
    grads = random_grads(pair)
    assert_all_arrives(pair, grads, normalised(pair, grads))


def test_single_precision() -> None:
    module = made("layer norm").float()
    x, start = (value.float() for value in draw(30, 6))
    pair = pair_of("LayerNorm", module, [x], [start], module=module)
    grads = random_grads(pair)
    assert_all_arrives(pair, grads, normalised(pair, grads), 1e-5)
