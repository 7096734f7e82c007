"""Copies lie in memory as what they are made of, so that a model computes the same with them to the last bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import Tensor, nn

from tdhook import LRP, Target
from tdhook.tape.copies import copied
from tdhook.tape.functions import copy_of
from tdhook.tape.internals import is_view

# Each of a tensor [3, 24].
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda h: h,
    "expanded": lambda h: h.view(3, 2, 12)[:, :1].expand(3, 5, 12),
    "expanded along the batch": lambda h: h.view(3, 2, 12)[:1].expand(4, 2, 12),
    "rows left out": lambda h: h.view(3, 4, 6)[:, 1:],
    "columns left out": lambda h: h.view(3, 2, 12)[..., :7],
    "every other column": lambda h: h.view(3, 2, 12)[..., ::2],
    "transposed": lambda h: h.view(3, 12, 2).mT,
    "transposed, with gaps": lambda h: h.view(3, 6, 4)[..., :3].mT,
    "windows side by side": lambda h: h.unfold(1, 6, 6),
    "windows that overlap": lambda h: h.unfold(1, 6, 3),
    "channels last": lambda h: h.view(3, 2, 3, 4).to(memory_format=torch.channels_last),
    "one row": lambda h: h.view(3, 4, 6)[:, 2],
    "behind the first number": lambda h: h.flatten()[1:61].view(5, 12),
    "one number": lambda h: h[1, 1],
    "nothing": lambda h: h[:, :0],
    "real parts": lambda h: torch.view_as_complex(h.view(3, 12, 2)).real,
}


def how_it_lies(x: Tensor) -> list[object]:
    """What kernels look at: which axes are expanded, lie in one another without a gap, and in which order."""
    axes = sorted(range(x.dim()), key=x.stride)
    inside = [
        (i, j, x.stride(j) == x.stride(i) * x.shape[i])
        for i in axes
        for j in axes
        if x.shape[i] > 1 < x.shape[j]
    ]
    line = 64 // x.element_size()
    alone = [x.is_contiguous(), x.storage_offset() % line] if x.numel() > 1 else []
    return [axes, inside, alone, [step == 0 for step in x.stride()], [step % line for step in x.stride()]]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.float32])
def test_a_copy_lies_as_what_it_is_made_of(layout: str, dtype: torch.dtype) -> None:
    x = LAYOUTS[layout](torch.arange(72).view(3, 24).to(dtype))
    copy = copied(x)
    assert torch.equal(copy, x) and copy.dtype == dtype and not is_view(copy)
    assert how_it_lies(copy) == how_it_lies(x)
    before = x.clone()
    if x.numel() and layout not in ("windows that overlap",) and "expanded" not in layout:
        copy.add_(1)
    assert torch.equal(x, before)


def test_a_copy_of_a_row_takes_the_memory_of_a_row() -> None:
    x = torch.rand(4, 1000, 6)
    assert copied(x[:, 3]).untyped_storage().nbytes() < 1000
    assert copied(x[:1, :1].expand(100, 50, 6)).untyped_storage().nbytes() == 24


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_pass_copies(layout: str) -> None:
    x = torch.rand(3, 24, requires_grad=True)
    z = LAYOUTS[layout](x)
    grad = torch.rand(z.shape)
    wanted = torch.autograd.grad(z, x, grad, retain_graph=True)
    assert torch.equal(torch.autograd.grad(copy_of(z), x, grad)[0], wanted[0])


USES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear": lambda x, w: F.linear(x, w[:, : x.shape[-1]], w[:, 0]),
    "product": lambda x, w: x @ x.mT if x.dim() > 1 else x,
    "sum": lambda x, w: x.sum(-1),
    "mean": lambda x, w: x.mean(0),
    "normalised": lambda x, w: F.layer_norm(x, x.shape[-1:]),
    "softmax": lambda x, w: x.softmax(-1),
}


class Overwrites(nn.Module):
    """Overwrites a value, and computes with what is taken from it."""

    def __init__(self, layout: str, use: str) -> None:
        super().__init__()
        self.layout, self.use = LAYOUTS[layout], USES[use]
        self.first, self.last = nn.Linear(24, 24), nn.Linear(24, 1)
        self.weight = torch.randn(7, 24)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x) * 1
        y.mul_(1.25)
        made = self.use(self.layout(y), self.weight)
        return torch.cat([made.reshape(1, -1).expand(3, -1), self.last(y)], 1)


@pytest.mark.parametrize("ledger", [False, True])
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name not in ("one number", "nothing")])
def test_outputs_of_a_model_that_overwrites_are_the_same_to_the_last_bit(
    layout: str, use: str, ledger: bool
) -> None:
    torch.manual_seed(0)
    model = Overwrites(layout, use).requires_grad_(False)
    x = torch.randn(3, 24)
    with LRP("epsilon", target=Target("output", 0), ledger=ledger).prepare(model) as explained:
        found = explained(TensorDict({"input": x}, [3]))["output"]
    assert torch.equal(found, model(x))
